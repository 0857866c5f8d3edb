"""Sentiment of film reviews: the homework's task."""

from tasks.base import ClassificationTask
from tasks.reasoning import WorkedExample

PROMPTS = {
    "default": (
        "Instruction: Please read the following text and classify it as either positive or "
        "negative sentiment. Positive sentiment means that the writer enjoys or praises what the "
        "text is about. Negative sentiment means that the writer dislikes or criticizes it. "
        "Answer with one word, positive or negative.\nText: {text}\nLabel:"
    ),
    "terse": "Instruction: Classify the sentiment.\nText: {text}\nLabel:",
    "detailed": (
        "Instruction: You are given one sentence from a film review. Decide what its writer "
        "thought of the film. Weigh praise of the acting, the story, the pictures and the music "
        "against complaints about them, and look through irony: a compliment can be meant as "
        "mockery. If the sentence as a whole would draw people into the cinema, its label is "
        "positive. If it would keep them away, its label is negative. Mixed sentences take the "
        "label of their stronger side. Write the label and nothing else.\nText: {text}\nLabel:"
    ),
    "question": (
        "Text: {text}\nInstruction: Did the writer of this text like the film? Answer positive "
        "for yes and negative for no.\nLabel:"
    ),
    "chat": (  # the message of a user; the model's own chat template follows
        "Is the sentiment of this film review positive or negative? Answer with one word, positive "
        "or negative.\n\nReview: {text}"
    ),
}


class SentimentTask(ClassificationTask):
    """Decide whether a film review is positive."""

    name = "sentiment"
    dataset = "rotten_tomatoes"
    prompts = PROMPTS
    labels = ("negative", "positive")
    noun = "reviews"
    worked_examples = (
        WorkedExample(
            "a slow, clumsy thriller that never earns its twists",
            "The writer calls the film slow and clumsy, and its twists unearned.", "negative"),
        WorkedExample(
            "the plot is thin, but two lovely performances carry it all the way",
            "The plot is criticized, but the praise of the acting decides.", "positive"),
        WorkedExample(
            "you could call it a comedy, if only somebody had remembered the jokes",
            "The compliment is mockery: the comedy has no jokes.", "negative"),
        WorkedExample(
            "warm, sharply observed and over far too soon",
            "The writer likes what he sees and wants more of it.", "positive"),
    )
