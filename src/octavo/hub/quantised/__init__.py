"""Checkpoints whose weights are quantised: which methods can be read, and their weights as plain ones.

The values are those of the file, but products are computed in the model's type: nothing rounds activations.
`hub.quantised.settings` reads the config, `methods` the names, `stored` the tensors, `weights` the numbers.
"""
