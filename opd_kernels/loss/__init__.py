"""distillation_loss: supports, objectives, and the walk over tokens."""
