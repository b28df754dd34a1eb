"""Validation of an encoded image with Pillow."""

import io
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps

# An allow-list: Pillow would start Ghostscript for an EPS file.
FORMATS = ("JPEG", "PNG", "WEBP")
# 256 MB in Pillow, 192 MB in DALI. A PNG of 109 KB can claim 9.5 GB.
MAX_PIXELS = 1 << 26
# The limit of the index and of JPEG.
MAX_SIDE_PX = 65535
EXIF_ORIENTATION = 0x0112
# Smaller squares are not searched for padding.
MIN_PADDED_PX = 64
# The darkest level that JPEG makes of white next to an edge.
PADDING_LEVEL = 245
# Where the data of a JPEG ended, its decoder writes zero coefficients, which are mid-grey in every
# channel. Encoded again as a JPEG of any quality, and resized, they stay exactly that.
FILL_LEVEL = 128
# An image with a larger share of such rows at the bottom is rejected. Cuts at random places lose
# more than this in seven of eight images. Thinner bands may be drawn, and a crop loses little.
MAX_FILL_SHARE = 1 / 8
# Rows compared at a time. 12 MB for the widest image.
FILL_STRIP_ROWS = 64
JPEG_FRAMES = {0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16", "I;16B")
OTHER_IMAGES = (
    b"GIF8",
    b"BM",
    b"II*\0",
    b"MM\0*",
    b"%!PS",
    b"\0\0\1\0",
    b"8BPS",
    b"\0\0\0\x0cjP  ",
    b"\xff\x0a",
)


class Rejected(Exception):
    """An image or caption that is excluded from training.

    `reason` is one word, by which rejections are counted. The message has the details.
    """

    def __init__(self, reason: str, detail: object = "") -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class ImageInfo:
    """Properties of a good image."""

    # Upright, in pixels.
    width: int
    height: int
    # The image must be laid on white (see on_white) before DALI decodes it.
    transparent: bool
    # Remarks that are counted: trailing, icc_bad, alpha, constant, padded, grey_rows.
    notes: tuple[str, ...]


def check_image(
    data: bytes,
    *,
    min_size_px: int,
    max_aspect: float,
    max_pixels: int = MAX_PIXELS,
    whole: bool = True,
) -> ImageInfo:
    """Validate an encoded image as training sees it, with EXIF orientation applied.

    The header is checked first, so an image of a bad size or format allocates nothing. Then the
    whole image is decoded.

    Args:
        data: the encoded image. With whole=False its first bytes are enough.
        min_size_px: least length of the shorter edge.
        max_aspect: largest longer edge / shorter edge.
        max_pixels: largest number of pixels.
        whole: decode the image. If False, only its header is read.

    Raises:
        Rejected: with reason truncated, half_grey, not_image, unsupported, bad_header, too_large,
            too_small, aspect or animated.
    """
    kind = _kind(data)
    scan = _check_jpeg_header(data, max_pixels) if kind == "JPEG" else 0
    if kind == "PNG" and whole:
        _check_png_chunks(data)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(*image.size, min_size_px, max_aspect, max_pixels)
            if image.mode not in MODES:
                raise Rejected("unsupported", f"pixel mode {image.mode}")
            # The first frame of a JPEG with several (MPO) is used.
            if kind != "JPEG" and getattr(image, "n_frames", 1) > 1:
                raise Rejected("animated", f"{image.n_frames} frames")
            width, height = image.size
            if not whole:
                if _is_turned(image):
                    width, height = height, width
                return ImageInfo(width, height, image.has_transparency_data, ())
            image.load()
            num_fill_rows = 0 if kind == "PNG" else _num_fill_rows(image)
            if num_fill_rows > MAX_FILL_SHARE * height:
                lost = f"the lowest {num_fill_rows} of {height} rows are the decoder's grey"
                raise Rejected("half_grey", lost)
            # PNG may store its orientation after the pixels, so it is known only after loading.
            if _is_turned(image):
                width, height = height, width
            transparent = image.has_transparency_data and _has_clear_pixels(image)
            notes = {
                "trailing": _has_trailing_bytes(kind, data, scan),
                "alpha": transparent,
                "icc_bad": not _is_icc(image.info.get("icc_profile")),
                "constant": _is_constant(image),
                "padded": _is_padded(image),
                "grey_rows": num_fill_rows > 0,
            }
            return ImageInfo(
                width, height, transparent, tuple(note for note, holds in notes.items() if holds)
            )
    except Rejected:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Rejected("too_large", str(error)) from None
    except MemoryError:
        raise Rejected("too_large", "not enough memory to decode it") from None
    except Exception as error:
        # Pillow's parsers raise OSError, SyntaxError, struct.error, ValueError and more.
        reason = (
            "truncated"
            if "truncated" in str(error).lower() or _ends_early(kind, data)
            else "bad_header"
        )
        raise Rejected(reason, f"{type(error).__name__}: {error}") from None


def on_white(data: bytes) -> bytes:
    """Lay a transparent image on white and return it upright as an uncompressed PNG.

    Few images need this. DALI would drop their alpha channel.
    """
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        image = ImageOps.exif_transpose(image).convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    out = io.BytesIO()
    Image.alpha_composite(white, image).convert("RGB").save(out, "PNG", compress_level=0)
    return out.getvalue()


def _kind(data: bytes) -> str:
    """Return the format by the first bytes, independent of the file's name."""
    if data[:3] == b"\xff\xd8\xff":
        return "JPEG"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "PNG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if len(data) < 12 and any(
        start.startswith(data[: len(start)]) for start in (b"\xff\xd8\xff", b"\x89PNG", b"RIFF")
    ):
        raise Rejected("truncated", f"{len(data)} bytes")
    if data.startswith(OTHER_IMAGES) or data[4:8] == b"ftyp":
        raise Rejected("unsupported", "not a JPEG, PNG or WebP image")
    raise Rejected("not_image", f"starts with {data[:8]!r}")


def _check_jpeg_header(data: bytes, max_pixels: int) -> int:
    """Return the position of the scan, after checking the markers before it.

    The check is as strict as DALI's parser. libjpeg would skip garbage, and decode an arithmetic or
    lossless frame to garbage. An absurd size is rejected here, before anything is allocated.
    """
    at = 2
    frame = None
    while True:
        if at + 4 > len(data):
            raise Rejected("truncated", "the data ends inside the header")
        marker = data[at + 1]
        if data[at] != 0xFF or marker < 0xC0:
            raise Rejected("bad_header", f"no marker at byte {at}")
        if marker == 0xD9:
            raise Rejected("truncated", "the data ends before the scan")
        if marker == 0xDA:
            break
        if marker in JPEG_FRAMES:
            frame = marker, data[at + 4 : at + 10]
        if 0xD0 <= marker <= 0xD8:
            at += 2
        elif marker == 0xFF:
            at += 1
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    if frame is None or len(frame[1]) < 6:
        raise Rejected("bad_header", "the scan precedes the frame header")
    marker, fields = frame
    precision, height, width, components = struct.unpack(">BHHB", fields)
    if marker not in (0xC0, 0xC1, 0xC2) or precision != 8 or components not in (1, 3, 4):
        raise Rejected(
            "unsupported", f"JPEG process {marker:#x}, {precision} bits, {components} components"
        )
    if not width or not height:
        raise Rejected("bad_header", f"the header claims {width} x {height}")
    if width * height > max_pixels:
        raise Rejected("too_large", f"{width} x {height}")
    return at


def _check_png_chunks(data: bytes) -> None:
    """Check the CRCs of all chunks up to the end, as DALI's libpng does.

    Pillow checks only what it needs for the pixels.
    """
    at = 8
    name = b""
    while name != b"IEND":
        length, name = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        end = at + 8 + length
        if end + 4 > len(data):
            raise Rejected("truncated", f"the data ends inside the chunk at byte {at}")
        if zlib.crc32(data[at + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise Rejected("bad_header", f"the chunk at byte {at} does not match its CRC")
        at = end + 4


def _check_size(
    width: int, height: int, min_size_px: int, max_aspect: float, max_pixels: int
) -> None:
    if width * height > max_pixels or max(width, height) > MAX_SIDE_PX:
        raise Rejected("too_large", f"{width} x {height}")
    if min(width, height) < min_size_px:
        raise Rejected("too_small", f"{width} x {height}")
    if max(width, height) > max_aspect * min(width, height):
        raise Rejected("aspect", f"{width} x {height}")


def _ends_early(kind: str, data: bytes) -> bool:
    if kind == "JPEG":
        return b"\xff\xd9" not in data
    if kind == "PNG":
        return b"IEND" not in data
    return int.from_bytes(data[4:8], "little") + 8 > len(data)


def _is_turned(image: Image.Image) -> bool:
    """Return whether EXIF orientation swaps width and height."""
    return image.getexif().get(EXIF_ORIENTATION) in (5, 6, 7, 8)


def _has_clear_pixels(image: Image.Image) -> bool:
    alpha = (
        image.getchannel("A") if "A" in image.getbands() else image.convert("RGBA").getchannel("A")
    )
    return alpha.getextrema()[0] < 255


def _has_trailing_bytes(kind: str, data: bytes, scan: int) -> bool:
    """Return whether bytes follow the image: garbage, a second image, more frames of an MPO."""
    if kind == "JPEG":
        # Entropy-coded data never contains this pair.
        return data.find(b"\xff\xd9", scan) + 2 < len(data)
    if kind == "PNG":
        return data.rfind(b"IEND") + 8 < len(data)
    return int.from_bytes(data[4:8], "little") + 8 + data[4] % 2 < len(data)


def _is_icc(profile: Any) -> bool:
    return profile is None or (len(profile) >= 128 and profile[36:40] == b"acsp")


def _is_constant(image: Image.Image) -> bool:
    """Return whether all pixels are equal. The four corners nearly always decide."""
    right, bottom = image.width - 1, image.height - 1
    corner = image.getpixel((0, 0))
    if any(image.getpixel(place) != corner for place in ((right, 0), (0, bottom), (right, bottom))):
        return False
    extrema = image.getextrema()
    return all(
        low == high for low, high in (extrema if isinstance(extrema[0], tuple) else (extrema,))
    )


def _num_fill_rows(image: Image.Image) -> int:
    """Return the number of lowest rows that a decoder seems to have filled for lack of data.

    Every pixel of such a row is exactly FILL_LEVEL. The two lower corners nearly always decide. An
    image whose top row is one too has a grey background or border, or is constant, and has none.
    """
    if image.mode not in ("L", "RGB"):
        return 0
    right, bottom = image.width - 1, image.height - 1
    fill = FILL_LEVEL if image.mode == "L" else (FILL_LEVEL,) * 3
    if any(image.getpixel(place) != fill for place in ((0, bottom), (right, bottom))):
        return 0
    if _fill_rows(image, 0, 1).all():
        return 0
    num = 0
    for end in range(image.height, 0, -FILL_STRIP_ROWS):
        filled = _fill_rows(image, max(0, end - FILL_STRIP_ROWS), end)
        if not filled.all():
            return num + int(np.argmin(filled[::-1]))
        num += len(filled)
    return num


def _fill_rows(image: Image.Image, start: int, end: int) -> np.ndarray:
    """Return which rows [start, end) have the level FILL_LEVEL in all channels of all pixels."""
    rows = np.asarray(image.crop((0, start, image.width, end)))
    return (rows == FILL_LEVEL).reshape(len(rows), -1).all(axis=1)


def _is_padded(image: Image.Image) -> bool:
    """Return whether an image looks padded to a square, as by img2dataset's resize_mode=border.

    A padded image has two equal white bands, above and below or left and right, and no other white
    border. Pictures of things on a white background have a border on all sides.
    """
    side, other = image.size
    if side != other or side < MIN_PADDED_PX:
        return False
    corners = [
        image.crop(box).convert("L").getextrema()[0]
        for box in ((0, 0, 8, 8), (side - 8, side - 8, side, side))
    ]
    if min(corners) < PADDING_LEVEL:
        return False
    white = np.asarray(image.convert("L")) >= PADDING_LEVEL
    # Of rows, of columns.
    bands = [_band(white.all(axis=1)), _band(white.all(axis=0))]
    wide = [band for band in bands if min(band) >= side // 50]
    return len(wide) == 1 and abs(wide[0][0] - wide[0][1]) <= side // 50


def _band(white: np.ndarray) -> tuple[int, int]:
    """Return the number of white lines at the start and at the end."""
    if white.all():
        return 0, 0
    return int(np.argmin(white)), int(np.argmin(white[::-1]))
