"""Neural tangent kernels of any torch module: the function-space view of amortised inference.

The empirical kernel ``K(x, x') = J(x) J(x')^T`` of a network with ``q`` outputs is a matrix of ``q`` by ``q`` for every
pair of inputs. Three routes give it, and agree to rounding: :func:`jacobian_gram` for any module,
:func:`layerwise_gram` for dense ones at a cost without the number of parameters, and :func:`ntk_product` that never
builds it. :func:`relu_kernel` and :func:`circle_spectrum` are the limits of wide ReLU networks in closed form, and
:class:`LinearisedNetwork` is the network whose kernel never moves.
"""

from vifamily.ntk.drift import DriftRecorder, KernelDrift, WidthSweep, kernel_drift, width_sweep
from vifamily.ntk.gram import jacobian_gram, layerwise_gram, ntk_product
from vifamily.ntk.infinite import TwoLayerReLU, circle_spectrum, relu_kernel
from vifamily.ntk.linearised import LinearisedNetwork
from vifamily.ntk.spectrum import Alignment, KernelReport, alignment, kernel_report

__all__ = [
    "Alignment",
    "DriftRecorder",
    "KernelDrift",
    "KernelReport",
    "LinearisedNetwork",
    "TwoLayerReLU",
    "WidthSweep",
    "alignment",
    "circle_spectrum",
    "jacobian_gram",
    "kernel_drift",
    "kernel_report",
    "layerwise_gram",
    "ntk_product",
    "relu_kernel",
    "width_sweep",
]
