"""What a model costs, computed from its structure alone: parameters, FLOPs, memory of a training step."""

from toto.model.budget.parameters import parameter_line, parameter_table

__all__ = ["parameter_line", "parameter_table"]
