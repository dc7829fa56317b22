"""ODEs as layers of networks, and the networks that they are compared with."""
