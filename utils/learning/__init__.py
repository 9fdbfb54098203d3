"""The maths of a step: timesteps and loss, optimizers, learning-rate schedules."""
