"""What can be wrong with an image."""


class ImageError(ValueError):
    """An image that cannot be used; the message is one line that names the file."""


class UndecodableImageError(ImageError):
    """An image that cannot be read or decoded, or whose size is not what the annotations say.

    Attributes:
        file_name: the image file.
    """

    def __init__(self, message: str, file_name: str = ""):
        super().__init__(message, file_name)
        self.file_name = file_name

    def __str__(self) -> str:
        return self.args[0]
