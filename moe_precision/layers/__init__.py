"""What a model's experts are: its module tree, the experts and routers in it, and the layers they make."""
