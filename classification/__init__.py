"""The parts of the transfer job: pictures in class folders, ResNet-18, scores."""
