"""Pretrain assets/gpt2-mini, in about an hour and a half on two cores."""

out_dir = "out/pretrain_mini"
# One pass over 47 million tokens. Few of them are verdicts, which the task needs: they weigh more.
passes = 2
verdict_weight = 8
n_layer = 4
n_head = 4
n_embd = 256
block_size = 256
batch_size = 12
max_iters = 15500
# A full softmax over all 50,257 tokens takes seven times as long per step on a CPU.
negatives = 2000
full_softmax_iters = 50
learning_rate = 2.5e-3
warmup_iters = 200
decay_lr = True
min_lr = 2.5e-5
beta2 = 0.98
eval_interval = 1500
eval_iters = 20
