"""One view of every vision transformer: the place where host libraries differ."""

from martlet.vit.view import AttentionView, BlockView, LinearView, MlpView, Part, TokenLayout, VitView, Window, view

__all__ = ["AttentionView", "BlockView", "LinearView", "MlpView", "Part", "TokenLayout", "VitView", "Window", "view"]
