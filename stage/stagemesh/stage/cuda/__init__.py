"""The CUDA engine. Importing a module here needs torch; none needs a device until it is used."""
