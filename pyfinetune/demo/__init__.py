"""`pyfinetune demo`: a small language model is made and fine-tuned on this machine, with nothing to download.

    docstrings -> prepare -> pretrain -> QLoRA -> compare -> result

Read in this order: `docstrings` (the texts), `settings`, `stages` (the training, with the steps of `pyfinetune.train`),
`compare` (with and without the kernels), `screen` (what a person sees), `run`.
"""
