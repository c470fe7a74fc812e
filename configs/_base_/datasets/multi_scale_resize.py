# Swin's multi-scale training, after DETR: the shorter side is one of 480 to 800 pixels; of half of
# the images a crop, taken at 400 to 600 pixels, is enlarged so.
multi_scale_resize = dict(
    type='RandomChoice',
    transforms=[
        [
            *crop,
            dict(
                type='RandomChoiceResize',
                scales=[(side, 1333) for side in range(480, 801, 32)],
                keep_ratio=True,
            ),
        ]
        for crop in (
            [],
            [
                dict(
                    type='RandomChoiceResize',
                    scales=[(400, 1333), (500, 1333), (600, 1333)],
                    keep_ratio=True,
                ),
                dict(
                    type='RandomCrop',
                    crop_type='absolute_range',
                    crop_size=(384, 600),
                    allow_negative_crop=True,
                ),
            ],
        )
    ],
)
