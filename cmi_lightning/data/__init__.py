"""Lightning data modules: image folders, given measurements, and Fashion-MNIST."""

from cmi_lightning.data.fashion import FashionMNIST, FashionMNISTData

__all__ = ["FashionMNIST", "FashionMNISTData"]
