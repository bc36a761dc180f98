"""distillation_loss and what it is made of: supports, objectives and the walk over tokens."""
