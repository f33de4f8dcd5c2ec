"""``octavo verify``: whether a model says here what it says in Transformers, token by token and logit by logit."""
