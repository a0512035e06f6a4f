"""The one model of the example."""

from django.db import models
from django.utils import timezone


class Article(models.Model):
    """A news article, published in the moment it is saved."""

    headline = models.CharField(max_length=200)
    summary = models.TextField(max_length=2000, blank=True)
    source = models.CharField(max_length=80, blank=True, default="Newsroom")
    category = models.CharField(max_length=40, blank=True, default="General")
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    class Meta:
        # By id, newest first: two articles may share a created_at, never an id.
        ordering = ["-id"]

    def __str__(self) -> str:
        return self.headline

    def as_dict(self) -> dict:
        """The article as it is published and answered: plain JSON types only."""
        return {
            "id": self.pk,
            "headline": self.headline,
            "summary": self.summary,
            "source": self.source,
            "category": self.category,
            "created_at": self.created_at.isoformat(),
        }
