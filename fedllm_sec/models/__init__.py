"""Models. `MENU` lists the small ones a recipe can name; language models are loaded by `lora`.

A small model is made by `make(shape, classes, **settings)`: shape of one input, number of classes or characters.
"""

from __future__ import annotations

from fedllm_sec.models.cnn import cnn
from fedllm_sec.models.darts import darts
from fedllm_sec.models.gan import dcgan, mlp_gan
from fedllm_sec.models.lenet import lenet
from fedllm_sec.models.logistic import logistic
from fedllm_sec.models.pretrained import image_classifier
from fedllm_sec.models.resnet import resnet, resnet18
from fedllm_sec.models.rnn import lstm
from fedllm_sec.models.sigmoid_cnn import sigmoid_cnn
from fedllm_sec.recipe.resolve import Entry

# the kind is the task that a model serves
MENU: dict[str, Entry] = {
    "logistic": Entry(logistic, "-", "classify"),
    "lenet": Entry(lenet, "LeCun et al. 1998", "classify"),
    "cnn": Entry(cnn, "McMahan et al. 2017", "classify"),
    "sigmoid_cnn": Entry(sigmoid_cnn, "Zhu et al. 2019", "classify"),
    "resnet": Entry(resnet, "He et al. 2016", "classify"),
    "resnet18": Entry(resnet18, "He et al. 2016", "classify"),
    "image_classifier": Entry(image_classifier, "-", "classify"),
    "lstm": Entry(lstm, "McMahan et al. 2017", "next_char"),
    "mlp_gan": Entry(mlp_gan, "Goodfellow et al. 2014", "gan"),
    "dcgan": Entry(dcgan, "Radford et al. 2016", "gan"),
    "darts": Entry(darts, "Liu et al. 2019", "nas"),
}
