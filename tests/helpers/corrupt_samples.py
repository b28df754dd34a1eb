"""Malformed images, captions and tars, each with the result that `iomm index` must give."""

import gzip
import io
import os
import struct
import tarfile
import zlib

import numpy as np
from PIL import Image


def smooth_image(width, height, seed=0):
    """Return an image that JPEG compresses well: enlarged coarse noise."""
    cells = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((width, height), Image.BICUBIC)


def encode(image, kind="JPEG", **options):
    out = io.BytesIO()
    image.save(out, kind, **({"quality": 95} | options if kind == "JPEG" else options))
    return out.getvalue()


def png_chunk(kind, data):
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def big_png(width, height):
    """Return a PNG that really has this size. All pixels are black, compressed a thousandfold."""
    packer = zlib.compressobj(9)
    rows = []
    row = bytes(1 + width)
    for _ in range(0, height, 100):
        rows.append(packer.compress(row * 100))
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
        + png_chunk(b"IDAT", b"".join(rows) + packer.flush())
        + png_chunk(b"IEND", b"")
    )


def with_bytes(data, at, new):
    return data[:at] + new + data[at + len(new) :]


def without_segment(data, marker):
    at = data.index(marker)
    return data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]


def exif_of(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def cut_with_end(jpeg, share):
    """Return a JPEG that lacks the end of its data but has an end marker.

    Decoders accept it and write grey where the data are missing. `share` is of the data of the
    first scan onwards.
    """
    start = jpeg.index(b"\xff\xda") + 14
    return jpeg[: start + int((len(jpeg) - start - 2) * share)].rstrip(b"\xff") + b"\xff\xd9"


def encoded_again(jpeg, size=None, kind="JPEG", **options):
    """Return an image decoded, resized and encoded again, as tools for datasets do."""
    with Image.open(io.BytesIO(jpeg)) as image:
        image.load()
    return encode(image.resize(size or image.size, Image.BICUBIC), kind, **options)


def with_lower_part(photo, level, share=0.5, noise=0):
    """Return a copy of a photograph whose lower `share` has this level, with or without noise."""
    pixels = np.asarray(photo).copy()
    lower = pixels[len(pixels) - round(len(pixels) * share) :]
    random = np.random.default_rng(4)
    lower[...] = level + random.integers(-noise, noise, lower.shape, endpoint=True)
    return Image.fromarray(pixels)


def within(photo, size, colour):
    """Return a photograph in the middle of a canvas of one colour."""
    canvas = Image.new("RGB", size, colour)
    canvas.paste(
        photo, tuple((side - own) // 2 for side, own in zip(size, photo.size, strict=True))
    )
    return canvas


def animated(kind):
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    return encode(frames[0], kind, save_all=True, append_images=frames[1:])


def images():
    """Return {name: (bytes, expected)}, 91 cases.

    `expected` is a reason for rejection, or the set of remarks on a good image. undetectable() has
    three more cases, with damage after the header that only a checksum detects.
    """
    photo = smooth_image(200, 180)
    jpeg = encode(photo)
    frame, scan = jpeg.index(b"\xff\xc0"), jpeg.index(b"\xff\xda")
    progressive, png, webp = (
        encode(photo, progressive=True),
        encode(photo, "PNG"),
        encode(photo, "WEBP"),
    )
    clear = photo.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(photo.size))
    grey16 = Image.fromarray(np.asarray(photo.convert("L"), dtype=np.uint16) * 257)
    palette = photo.quantize(16)
    text = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(8 << 20), 9))
    large = encode(Image.new("L", (9000, 9000)), quality=30)
    half = cut_with_end(jpeg, 0.5)
    grey = 128, 128, 128
    return {
        # 1: almost empty
        "empty": (b"", "truncated"),
        "one_byte": (b"\xff", "truncated"),
        "soi": (b"\xff\xd8", "truncated"),
        "soi_eoi": (b"\xff\xd8\xff\xd9", "truncated"),
        "header_only": (jpeg[:scan], "truncated"),
        "cut_at_sos": (jpeg[: scan + 14], "truncated"),
        # 2: truncated
        **{
            f"cut_{share}": (jpeg[: len(jpeg) * share // 100], "truncated")
            for share in (10, 50, 90, 99)
        },
        "no_last_byte": (jpeg[:-1], "truncated"),
        "no_eoi": (jpeg[:-2], "truncated"),
        "progressive_half": (progressive[: len(progressive) // 2], "truncated"),
        # 3: truncated, but with an end marker, or decoded in spite of it and encoded again
        "half_grey": (half, "half_grey"),
        "half_grey_444": (cut_with_end(encode(photo, subsampling=0), 0.5), "half_grey"),
        "half_grey_l": (cut_with_end(encode(photo.convert("L")), 0.5), "half_grey"),
        "half_grey_turned": (
            cut_with_end(encode(photo, exif=exif_of(6)), 0.5),
            "half_grey",
        ),
        # Grey remains only where the first scan of a progressive JPEG is cut, which is its DC scan.
        "half_grey_progressive": (cut_with_end(progressive, 0.05), "half_grey"),
        "half_grey_again": (encoded_again(half, quality=60), "half_grey"),
        "half_grey_resized": (encoded_again(half, (151, 140)), "half_grey"),
        "half_grey_webp": (encoded_again(half, kind="WEBP", lossless=True), "half_grey"),
        "mostly_grey": (cut_with_end(jpeg, 0.02), "half_grey"),
        "last_rows_grey": (cut_with_end(jpeg, 0.95), {"grey_rows"}),
        # Pictures that only look like these.
        "grey_wall": (encode(with_lower_part(photo, 128, noise=3)), set()),
        "even_wall": (encode(with_lower_part(photo, 127)), set()),
        "grey_around": (encode(within(photo, (260, 300), grey)), set()),
        "grey_above_and_below": (encode(within(photo, (200, 300), grey)), set()),
        "white_margins": (encode(within(photo, (260, 300), "white")), set()),
        "white_below": (encode(with_lower_part(photo, 255)), set()),
        "night_below": (encode(with_lower_part(photo, 0)), set()),
        "letterbox": (encode(within(photo, (200, 260), "black")), set()),
        "constant_grey": (encode(Image.new("RGB", (64, 48), grey)), {"constant"}),
        # 4: damaged or foreign headers
        "marker_bit": (with_bytes(jpeg, frame + 1, b"\xd0"), "bad_header"),
        "no_dqt": (without_segment(jpeg, b"\xff\xdb"), "bad_header"),
        "no_size": (with_bytes(jpeg, frame + 5, bytes(4)), "bad_header"),
        "no_height": (with_bytes(jpeg, frame + 5, bytes(2)), "bad_header"),
        "twelve_bit": (with_bytes(jpeg, frame + 4, b"\x0c"), "unsupported"),
        "five_components": (with_bytes(jpeg, frame + 9, b"\x05"), "unsupported"),
        "lossless": (with_bytes(jpeg, frame + 1, b"\xc3"), "unsupported"),
        # 5: no Huffman tables, for which libjpeg uses the standard ones as for MJPEG; arithmetic
        "no_dht": (without_segment(jpeg, b"\xff\xc4"), set()),
        "arithmetic": (with_bytes(jpeg, frame + 1, b"\xc9"), "unsupported"),
        # 6, 7, 8: too large, by the header or in fact
        "jpeg_bomb": (with_bytes(jpeg, frame + 5, struct.pack(">HH", 65500, 65500)), "too_large"),
        "png_bomb": (big_png(30000, 30000), "too_large"),
        "png_144_mpx": (big_png(12000, 12000), "too_large"),
        "jpeg_81_mpx": (large, "too_large"),
        # 9: bytes after the image
        "trailing": (jpeg + os.urandom(1 << 20), {"trailing"}),
        "two_jpegs": (jpeg + jpeg, {"trailing"}),
        "mpo": (encode(photo, "MPO", save_all=True, append_images=[photo]), {"trailing"}),
        # 10: bytes before the image
        "newline_first": (b"\r\n" + jpeg, "not_image"),
        "mark_first": (b"\xef\xbb\xbf" + jpeg, "not_image"),
        "gzip": (gzip.compress(jpeg), "not_image"),
        # 11, 12: not images
        "random": (np.random.default_rng(1).bytes(5000), "not_image"),
        "zeros": (bytes(5000), "not_image"),
        "html": (b"<html><body>404 Not Found</body></html>", "not_image"),
        "svg": (b"<svg xmlns='x'/>", "not_image"),
        "pdf": (b"%PDF-1.4\n%EOF", "not_image"),
        "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\nshowpage\n", "unsupported"),
        # 13, 14, 15: colours
        "cmyk": (encode(photo.convert("CMYK")), set()),
        "grey": (encode(photo.convert("L")), set()),
        "grey_alpha": (encode(clear.convert("LA"), "PNG"), {"alpha"}),
        "one_bit": (encode(photo.convert("1"), "PNG"), set()),
        "palette_transparent": (
            encode(palette, "PNG", transparency=palette.getpixel((0, 0))),
            {"alpha"},
        ),
        "rgba": (encode(clear, "PNG"), {"alpha"}),
        "grey_16": (encode(grey16, "PNG"), set()),
        "rgb_16": (rgb16_png(photo), set()),
        # 16: orientation
        **{
            f"turned_{turn}": (encode(photo, exif=exif_of(turn)), set()) for turn in (2, 3, 6, 8, 9)
        },
        "bad_exif": (encode(photo, exif=b"Exif\0\0garbage"), set()),
        # 17, 18: profile, size, content
        "bad_icc": (encode(photo, icc_profile=b"garbage" * 30), {"icc_bad"}),
        "one_pixel": (encode(smooth_image(1, 1)), "too_small"),
        "line": (encode(smooth_image(1, 4000)), "too_small"),
        "strip": (encode(smooth_image(4000, 8)), "too_small"),
        "ribbon": (encode(smooth_image(65500, 16)), "too_small"),
        "long": (encode(smooth_image(1000, 40)), "aspect"),
        "constant": (encode(Image.new("RGB", (64, 48), "red")), {"constant"}),
        # 19, 20, 21: other formats under a .jpg name
        "is_png": (png, set()),
        "is_webp": (webp, set()),
        "is_bmp": (encode(photo, "BMP"), "unsupported"),
        "is_tiff": (encode(photo, "TIFF"), "unsupported"),
        "is_gif": (encode(photo, "GIF"), "unsupported"),
        "animated_gif": (animated("GIF"), "unsupported"),
        "is_avif": (b"\0\0\0\x1cftypavif\0\0\0\0" + bytes(200), "unsupported"),
        "animated_webp": (animated("WEBP"), "animated"),
        "webp_half": (webp[: len(webp) // 2], "truncated"),
        # 22, 23: PNG
        "png_bad_crc": (
            with_bytes(png, png.index(b"IDAT") + 40, bytes([png[png.index(b"IDAT") + 40] ^ 1])),
            "bad_header",
        ),
        "png_half": (png[: len(png) // 2], "truncated"),
        "png_text_bomb": (png[:33] + text + png[33:], "bad_header"),
        "progressive": (progressive, set()),
    }


def undetectable():
    """Return (a JPEG, {name: the JPEG with damage that no decoder detects}).

    The damage is inside the entropy-coded data.
    """
    jpeg = encode(smooth_image(400, 300))
    start = jpeg.index(b"\xff\xda") + 14
    middle = len(jpeg) // 2
    random = np.random.default_rng(2)
    bits = bytearray(jpeg)
    for at in random.integers(start, len(jpeg) - 2, 20):
        bits[at] ^= 1 << int(random.integers(0, 8))
    return jpeg, {
        "one_bit": with_bytes(jpeg, middle, bytes([jpeg[middle] ^ 1])),
        "twenty_bits": bytes(bits),
        "hole": with_bytes(jpeg, middle, bytes(min(4096, len(jpeg) - middle - 2))),
    }


def rgb16_png(image):
    rows = np.asarray(image, dtype=">u2") * 257
    pixels = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", struct.pack(">IIBBBBB", *image.size, 16, 2, 0, 0, 0))
        + png_chunk(b"IDAT", zlib.compress(pixels))
        + png_chunk(b"IEND", b"")
    )


def captions():
    """Return {name: (suffix, bytes, text, or None if it must be rejected)}, 25 cases."""
    return {
        "plain": ("txt", b"a dog", "a dog"),
        "umlaut": ("txt", "ein Bär".encode(), "ein Bär"),
        "bom": ("txt", b"\xef\xbb\xbfa dog", "a dog"),
        "empty": ("txt", b"", ""),
        "blank": ("txt", b" \n\t ", ""),
        "astral": ("txt", "a 🐕".encode(), "a 🐕"),
        "crlf": ("txt", b"a dog\r\n", "a dog"),
        "latin1": ("txt", "ein Bär".encode("latin1"), None),
        "utf16": ("txt", "a dog".encode("utf-16"), None),
        "nul": ("txt", b"a\0dog", None),
        "cut_utf8": ("txt", "Bär".encode()[:2], None),
        "surrogate_bytes": ("txt", b"\xed\xa0\x80", None),
        "long": ("txt", b"x" * 70_000, None),
        "json": ("json", b'{"caption": "a dog", "width": 3}', "a dog"),
        "json_null": ("json", b'{"caption": null}', ""),
        "json_without": ("json", b'{"url": "x"}', ""),
        "json_list": ("json", b'["a dog"]', ""),
        "json_number": ("json", b'{"caption": 3}', None),
        "json_broken": ("json", b'{"caption": "a dog"', None),
        "json_deep": ("json", b"[" * 60_000, None),
        "json_digits": ("json", b'{"n": ' + b"1" * 5000 + b"}", None),
        "json_nan": ("json", b'{"caption": "x", "score": NaN}', None),
        "json_surrogate": ("json", b'{"caption": "\\ud800"}', None),
        "json_nul": ("json", b'{"caption": "a\\u0000"}', None),
        "json_twice": ("json", b'{"caption": "a cat", "caption": "a dog"}', "a dog"),
    }


def tar_of(members, form=tarfile.USTAR_FORMAT):
    """Return the bytes of a tar of (name, bytes) pairs or TarInfos."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return out.getvalue()


def special_member(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def tars(num=20):
    """Return {name: (bytes, number of good samples, {reason: count})}.

    The tars have `num` samples of jpg, txt and json, with damage at the middle one. A truncation
    between two members leaves no trace except the missing end mark, and is rejected as no_end.
    """
    jpeg = encode(smooth_image(48, 40))
    half = num // 2
    size = 512 + -(-len(jpeg) // 512) * 512
    samples = [
        [(f"{i:04d}.jpg", jpeg), (f"{i:04d}.txt", b"a dog"), (f"{i:04d}.json", b"{}")]
        for i in range(num)
    ]
    flat = [member for sample in samples for member in sample]
    whole = tar_of(flat)
    at = half * (size + 2 * 1024)
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    bare = whole[: num * (size + 2 * 1024)]

    def changed(offset, new):
        return with_bytes(whole, at + offset, new)

    def with_header(**fields):
        info = tarfile.TarInfo("x.jpg")
        for key, value in fields.items():
            setattr(info, key, value)
        return changed(0, info.tobuf(tarfile.GNU_FORMAT)[:512])

    # The txt and json of the lost image remain.
    lost = {"bad_tar": 1, "incomplete": 1}
    odd = [("good.jpg", jpeg)]
    return {
        "none": (whole, num, {}),
        "cut_in_data": (whole[: at + 700], half, {"bad_tar": 1}),
        "cut_in_header": (whole[: at + 100], half, {"bad_tar": 1}),
        "cut_at_member": (whole[:at], half, {"no_end": 1}),
        "cut_after_jpg": (whole[: at + size], half + 1, {"no_end": 1}),
        "name_bit": (changed(3, b"X"), num - 1, lost),
        "size_bit": (changed(130, b"7"), num - 1, lost),
        "checksum_field": (changed(148, b"zzzz"), num - 1, lost),
        "one_zero_block": (whole[:at] + bytes(512) + whole[at:], num, {}),
        "two_zero_blocks": (whole[:at] + bytes(1024) + whole[at:], num, {}),
        "zeroed_header": (changed(0, bytes(512)), num - 1, {"bad_tar": 1, "incomplete": 1}),
        "two_tars": (tar_of(flat[: 3 * half]) + tar_of(flat[3 * half :]), num, {}),
        "garbage_in_data": (changed(512, b"\xaa" * 300), num - 1, {"not_image": 1}),
        "garbage_between": (whole[:at] + b"\xaa" * 1024 + whole[at:], num, {"bad_tar": 1}),
        "no_end": (bare, num, {"no_end": 1}),
        "one_end_block": (bare + bytes(512), num, {}),
        "trailing_garbage": (whole[:end] + bytes(1024) + b"x" * 700, num, {"bad_tar": 1}),
        "empty": (b"", 0, {}),
        "html": (b"<html>404</html>" * 200, 0, {"bad_tar": 1}),
        "gzip": (gzip.compress(whole), 0, {"bad_tar": 1}),
        "first_header": (with_bytes(whole, 3, b"X"), num - 1, lost),
        "terabyte": (with_header(size=1 << 40), num - 1, lost),
        "negative": (changed(0, negative_size()), num - 1, lost),
        "long_name_bomb": (with_header(type=b"L", size=1 << 21), num - 1, lost),
        "dot_dot": (tar_of([*odd, ("../../up.jpg", jpeg)]), 1, {"bad_name": 1}),
        "absolute": (tar_of([*odd, ("/etc/root.jpg", jpeg)]), 1, {"bad_name": 1}),
        "control": (tar_of([*odd, ("bell\a.jpg", jpeg)]), 1, {"bad_name": 1}),
        "symlink": (tar_of([*odd, special_member("s.jpg", tarfile.SYMTYPE, "/etc/passwd")]), 1, {}),
        "hardlink": (tar_of([*odd, special_member("h.jpg", tarfile.LNKTYPE, "good.jpg")]), 1, {}),
        "pipe": (tar_of([*odd, special_member("p.jpg", tarfile.FIFOTYPE)]), 1, {}),
        "device": (tar_of([*odd, special_member("d.jpg", tarfile.CHRTYPE)]), 1, {}),
        "dotted_keys": (
            tar_of(
                [
                    (f"img.v{i}.0{suffix}", data)
                    for i in range(5)
                    for suffix, data in ((".jpg", jpeg), (".txt", b"x"), (".json", b"{}"))
                ]
            ),
            5,
            {},
        ),
        "not_adjacent": (
            tar_of([flat[i] for i in sorted(range(len(flat)), key=lambda i: i % 3)]),
            num,
            {},
        ),
        "duplicate": (tar_of([*flat, flat[0]]), num - 1, {"duplicate": 1}),
        "no_images": (
            tar_of([member for member in flat if not member[0].endswith("jpg")]),
            0,
            {"incomplete": num},
        ),
        "no_captions": (tar_of([member for member in flat if member[0].endswith("jpg")]), num, {}),
        "empty_image": (tar_of([*flat[3:], ("e.jpg", b"")]), num - 1, {"truncated": 1}),
        "bad_caption": (
            tar_of([*flat[3:], ("u.jpg", jpeg), ("u.txt", b"\xff\xfe\xfa")]),
            num - 1,
            {"caption": 1},
        ),
        "bad_json": (
            tar_of([*flat[3:], ("j.jpg", jpeg), ("j.json", b"{broken")]),
            num - 1,
            {"caption": 1},
        ),
        "pax_size": (tar_of([*flat, pax_bomb()]), num, {}),
    }


def negative_size():
    header = bytearray(tarfile.TarInfo("x.jpg").tobuf(tarfile.USTAR_FORMAT)[:512])
    header[124:136] = b"\xff" * 12
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def pax_bomb():
    info = tarfile.TarInfo("v.bin")
    info.pax_headers = {"size": "9" * 5000}
    return info
