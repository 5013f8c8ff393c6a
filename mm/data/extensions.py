"""Extensions of members by what they hold; of its own, so that naming them loads no decoder."""

VIDEO_EXTENSIONS = (
    "mp4",
    "webm",
    "mkv",
    "mov",
    "m4v",
    "avi",
    "gif",
    "webp",
    "mpg",
    "mpeg",
    "ts",
    "flv",
    "wmv",
    "3gp",
    "ogv",
)
