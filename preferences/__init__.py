"""The controlled sentiment experiment of the DPO paper: pairs, training, the frontier."""
