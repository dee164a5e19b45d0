"""``python -m tasks.video {fit,validate,test,predict,check} -c configs/<name>.yaml``, and ``... evaluate``."""

import sys

if __name__ == "__main__":
    if sys.argv[1:2] == ["evaluate"]:  # needs NumPy alone and is to answer at once
        from tasks.video.evaluate import main as evaluate

        sys.exit(evaluate(sys.argv[2:]))

    from tasks.core.cli import main
    from tasks.video import clips, data  # noqa: F401  # their classes are the short names of `data`
    from tasks.video.datamodule import VideoDataModule
    from tasks.video.module import VideoModule

    main(VideoModule, VideoDataModule)
