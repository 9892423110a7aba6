"""From a model of transformers to a program: imported only where one is made, never where one is served."""
