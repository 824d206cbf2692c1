"""Any torch.nn.Module as a model of the engine."""
