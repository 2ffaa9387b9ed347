"""The network that the demonstration trains, and principal components to compare it with."""

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from ..layers import TailDropout


class Autoencoder(nn.Module):
    """Pixels to `width` features and back, with TailDropout on the features.

    Shape:
        `(batch, pixels)` in [0, 1], in and out.
    """

    def __init__(self, pixels: int, width: int, p: float = 0.5) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(pixels, 512), nn.GELU(), nn.Linear(512, 256), nn.GELU(), nn.Linear(256, width)
        )
        self.bottleneck = TailDropout(p)
        self.decoder = nn.Sequential(
            nn.Linear(width, 256),
            nn.GELU(),
            nn.Linear(256, 512),
            nn.GELU(),
            nn.Linear(512, pixels),
            nn.Sigmoid(),
        )

    def forward(self, images: Tensor) -> Tensor:
        reconstructions: Tensor = self.decoder(self.bottleneck(self.encoder(images)))
        return reconstructions


def train(
    model: nn.Module,
    images: Tensor,
    *,
    epochs: int,
    batch_size: int = 256,
    learning_rate: float = 3e-3,
) -> None:
    """Train the model to reconstruct `images`, with a progress bar."""
    steps = epochs * -(-len(images) // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    model.train()
    with tqdm(total=steps, desc="train", unit="batch") as bar:
        for epoch in range(epochs):
            for index in torch.randperm(len(images)).split(batch_size):
                batch = images[index]
                loss = functional.mse_loss(model(batch), batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
            bar.set_postfix(epoch=f"{epoch + 1}/{epochs}", loss=f"{loss.item():.4f}")


def pca_errors(train: Tensor, test: Tensor, ks: list[int]) -> list[float]:
    """Mean squared error on `test` of the first k principal components of `train`."""
    mean = train.double().mean(0)
    centred = train.double() - mean
    _, axes = torch.linalg.eigh(centred.T @ centred)  # increasing eigenvalues
    residual = test.double() - mean
    scores = residual @ axes.flip(1)  # (images, pixels), most important first
    explained = scores.square().mean(0).cumsum(0)
    total = residual.square().mean(0).sum()
    return [
        float(total - (explained[min(k, len(explained)) - 1] if k else 0)) / test.shape[1]
        for k in ks
    ]
