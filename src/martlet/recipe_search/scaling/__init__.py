"""Which network to train: topologies and sizes judged before training, or by a few short trainings of others."""
