"""Other architectures that the paper compares Toto with (Table 6), behind the same contract.

Their blocks are those of `transformers` (extra `baselines`), which is imported when a model is made.
"""
