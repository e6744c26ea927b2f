"""The layouts of PASCAL VOC and PASCAL-Context, drawn at small scale."""

from __future__ import annotations

from pathlib import Path

from drawn_files import (
    NAMED,
    Files,
    Meaning,
    Truth,
    grey,
    matlab,
    numbered,
    pack,
    pairs,
    palette,
    renamed,
    tiff,
    write,
)

VOC = numbered("2007_{n:06d}")
VOC_RAW = (0, 1, 8, 15, 16, 20, 255)
KIT = "VOCdevkit/VOC2012/"
LISTS = KIT + "ImageSets/Segmentation/"


def voc_value(value: int) -> int | None:
    return None if value in (0, 255) else value


def voc_files(meaning: Meaning = voc_value) -> tuple[Files, Truth]:
    """The kit with the two first training images; the other two have SBD's labels."""
    label = KIT + "SegmentationClass/{stem}.png"
    files, truth = pairs(VOC, KIT + "JPEGImages/{stem}.jpg", label, palette, VOC_RAW, meaning)
    for stem in VOC["train"][2:]:
        own = files.pop(f"{KIT}SegmentationClass/{stem}.png")
        files[f"{KIT}SegmentationClassAug/{stem}.png"] = own
    files[f"{LISTS}train.txt"] = "\n".join(VOC["train"][:2]).encode()
    files[f"{LISTS}val.txt"] = ("\n".join(VOC["val"]) + "\n").encode()
    return files, truth


def voc_trainaug(root: Path) -> Truth:
    files, truth = voc_files()
    write(root, files | {f"{LISTS}trainaug.txt": "\n".join(VOC["train"]).encode()})
    return truth


def voc_mmseg(root: Path) -> Truth:
    """`aug.txt` holds what train.txt lacks, and the root is the kit's own folder."""
    files, truth = voc_files()
    files[f"{LISTS}aug.txt"] = "\n".join(VOC["train"][2:]).encode()
    write(root, {name[len(KIT) :]: data for name, data in files.items()})
    return truth


def voc_aug_zip(root: Path) -> Truth:
    """The list with paths in its lines, and SBD's labels for all training images in their zip."""
    files, truth = voc_files()
    for stem in VOC["train"][:2]:
        files[f"{KIT}SegmentationClassAug/{stem}.png"] = files[f"{KIT}SegmentationClass/{stem}.png"]
    line = "/JPEGImages/{0}.jpg /SegmentationClassAug/{0}.png\n"
    files[f"{LISTS}train_aug.txt"] = "".join(map(line.format, VOC["train"])).encode()
    inside = (KIT + "SegmentationClassAug/", "SegmentationClassAug/")
    pack(root, files, {"SegmentationClassAug.zip": inside})
    return truth


def voc_one_zip(root: Path) -> Truth:
    files, truth = voc_files()
    files[f"{LISTS}trainaug.txt"] = "\n".join(VOC["train"]).encode()
    pack(root, files, {"archive.zip": ("VOCdevkit/", "VOCdevkit/")})
    return truth


def voc_background(root: Path) -> Truth:
    files, truth = voc_files(lambda value: None if value == 255 else value)
    write(root, files | {f"{LISTS}trainaug.txt": "\n".join(VOC["train"]).encode()})
    return truth


def voc_zero(root: Path) -> Truth:
    label, image = "annotations/{part}/{stem}.png", "images/{part}/{stem}.jpg"
    files, truth = pairs(VOC, image, label, grey, VOC_RAW, voc_value)
    write(root / "VOCZERO", files)
    return truth


def voc_d2(root: Path) -> Truth:
    files, truth = pairs(
        renamed(VOC, NAMED),
        "images/{part}/{stem}.jpg",
        "annotations_pascal20/{part}/{stem}.png",
        grey,
        (0, 7, 14, 19, 255),
        lambda value: None if value == 255 else value + 1,
    )
    write(root / "pascal_voc_d2", files)
    return truth


# PASCAL-Context

CONTEXT = numbered("2008_{n:06d}")
CONTEXT_KIT = "VOCdevkit/VOC2010/"
# raw value -> class of 59, for some: aeroplane, bag, cow, person, pottedplant, wood
RAW_OF_59 = {2: 1, 9: 2, 98: 20, 284: 37, 308: 40, 458: 59}


def context_lists(folder: str) -> Files:
    return {
        f"{CONTEXT_KIT}ImageSets/{folder}/{part}.txt": "\n".join(stems).encode()
        for part, stems in CONTEXT.items()
    }


def context_mmseg(root: Path) -> Truth:
    files, truth = pairs(
        CONTEXT,
        CONTEXT_KIT + "JPEGImages/{stem}.jpg",
        CONTEXT_KIT + "SegmentationClassContext/{stem}.png",
        grey,
        (0, 1, 20, 40, 59),
        lambda value: value or None,
    )
    write(root, files | context_lists("SegmentationContext"))
    return truth


def context_mat_files(meaning: Meaning) -> tuple[Files, Truth]:
    """Values of classes within and without the 59."""
    label = CONTEXT_KIT + "trainval/{stem}.mat"
    image = CONTEXT_KIT + "JPEGImages/{stem}.jpg"
    return pairs(CONTEXT, image, label, matlab, (0, 1, 459, *RAW_OF_59), meaning)


def context_mat_59(root: Path) -> Truth:
    files, truth = context_mat_files(RAW_OF_59.get)
    write(root, files | context_lists("Main"))
    return truth


def context_mat_459(root: Path) -> Truth:
    files, truth = context_mat_files(lambda value: value or None)
    files |= context_lists("SegmentationContext")
    pack(root, files, {"context.zip": ("VOCdevkit/VOC2010/", "VOC2010/")})
    return truth


def context_d2(root: Path) -> Truth:
    files, truth = pairs(
        renamed(CONTEXT, NAMED),
        "images/{part}/{stem}.jpg",
        "annotations_ctx459/{part}/{stem}.tif",
        tiff,
        (0, 300, 458, 65535),
        lambda value: None if value == 65535 else value + 1,
    )
    write(root / "pascal_ctx_d2", files)
    return truth


def context_val_only(root: Path) -> Truth:
    """Labels converted for val alone, as those have it who only test on it."""
    files, truth = pairs(
        {"pc59_val": CONTEXT["val"]},
        "JPEGImages/{stem}.jpg",
        "annotations_detectron2/{part}/{stem}.png",
        grey,
        (0, 19, 58, 255),
        lambda value: None if value == 255 else value + 1,
    )
    write(root / "VOCdevkit/VOC2010", files)
    return truth
