"""The sizes above which a file from elsewhere is refused, before its memory is taken. One constant for each kind."""

TEXT_BYTES = 1 << 26  # a config, a manifest, a log's or a set's JSON: 64 MiB, a million shards or a million lines
MEMBER_BYTES = 1 << 28  # a latent or a picture, alone or in an archive
PICTURE_PIXELS = 1 << 26  # ImageNet's largest has 61 million
ROW_GROUP_BYTES = 1 << 29  # the pictures of a parquet file's row group, decompressed
IDX_BYTES = 1 << 33  # an IDX file, decompressed: ten million images of 28 x 28
PICKLE_STEPS = 1000  # an array has about fifty
LAYERS = 1 << 10  # of a config without tensors that would tell
LEAST_SIZE = 256  # a whole number of a network's config up to here needs no tensor that is as long
LARGEST_FLOAT = 1e6  # of a network's config: no size, but a factor of one, or a period
CLASSES = 1 << 20  # of a data set
CAPTION_LETTERS = 1 << 16
TEXT_TOKENS = 1 << 13  # of a caption, and what captions are padded to
SEEDS = 1 << 24  # of images, as a list in memory
STEPS = 1 << 20  # of a sampler or a noise schedule
ARRAY_BYTES = 1 << 31  # an array of an .npz, decompressed
PARQUET_ROWS = 1 << 25
LOG_BYTES = 1 << 32  # metrics.jsonl; millions of lines
