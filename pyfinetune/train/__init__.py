"""The training layer: a YAML file in, an adapter out, with `transformers.Trainer` as the loop.

    from pyfinetune.train.config import load_config
    from pyfinetune.train.run import train

    result = train(load_config("run.yaml"))

Read in this order: `config`, `data`, `formats`, `tokenizing`, `packing`, `model`, `loop`, `callbacks`, `run`;
`planning` and `forecast` predict what a run takes.
"""
