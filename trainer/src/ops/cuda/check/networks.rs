//! A small network of convolutions, whose passes are recorded after the first, against the CPU's operators.

use anyhow::Result;
use candle_core::{Device, Tensor, Var};

use super::super::network::Runs;
use super::{Outcome, error, read, values};
use crate::ops::network::{Block, Kind, Layer, Network};
use crate::ops::{self, Precision};

/// Weights of all kinds of layers, by layer: shape of the weight and number of outputs.
const SHAPES: [([usize; 2], usize); 7] =
    [([4, 27], 4), ([9, 4], 4), ([6, 4], 6), ([8, 6], 8), ([9, 8], 8), ([6, 8], 6), ([10, 6], 10)];

/// Weights and biases for [`network`]. In f32 ReLU6 cuts some of what they give off at either end; in bf16 nothing comes near its edges,
/// which rounding would carry a value over, and its gradient with it.
pub fn weights(device: &Device, precision: Precision) -> candle_core::Result<Vec<Var>> {
    let (scale, [spread, middle]) = if precision == Precision::Bf16 { (0.06, [0.4, 2.2]) } else { (1.0, [0.3, 0.4]) };
    let mut vars = Vec::new();
    for (i, ([rows, columns], outputs)) in (0u32..).zip(SHAPES) {
        let drawn = |seed: u32, count: usize, by: f32, to: f32| values(seed, count).into_iter().map(move |v| v * by + to);
        vars.push(Var::from_vec(drawn(i, rows * columns, scale, 0.0).collect(), (rows, columns), device)?);
        vars.push(Var::from_vec(drawn(20 + i, outputs, spread, middle).collect(), outputs, device)?);
    }
    Ok(vars)
}

/// A first convolution, a block without a sum, one with a sum, and another layer if it is not to end with the sum.
pub fn network(vars: &[Var], ends_with_sum: bool) -> candle_core::Result<Network> {
    let [activated, linear] = [true, false].map(|activated| Kind::Pointwise { activated });
    let blocks: [(&[Kind], bool); 4] = [
        (&[Kind::Convolution { stride: 2 }], false),
        (&[Kind::Depthwise { stride: 2 }, linear], false),
        (&[activated, Kind::Depthwise { stride: 1 }, linear], true),
        (&[activated], false),
    ];
    let mut pairs = vars.chunks_exact(2).map(|pair| [pair[0].as_tensor().clone(), pair[1].as_tensor().clone()]);
    let block = |(kinds, residual): (&[Kind], bool)| {
        let layers = kinds.iter().zip(pairs.by_ref()).map(|(&kind, [weight, bias])| Layer { kind, weight, bias });
        Block { layers: layers.collect(), residual }
    };
    Network::new(blocks.into_iter().take(if ends_with_sum { 3 } else { 4 }).map(block).collect())
}

/// Images of 8×8 pixels of three colours.
pub fn pictures(seed: u32, count: usize, device: &Device) -> candle_core::Result<Tensor> {
    Tensor::from_vec(values(50 + seed, count * 64 * 3), (count, 64, 3), device)
}

/// A gradient that weighs every result differently.
pub fn by_result(of: &Tensor) -> candle_core::Result<Tensor> {
    Tensor::from_vec(values(70, of.elem_count()), of.shape(), of.device())
}

/// Result and gradients by all weights, as candle takes them through the CPU's operators.
pub fn composed(vars: &[Var], network: &Network, x: &Tensor) -> Result<Vec<Tensor>> {
    let y = network.run(x)?;
    let mut found = ops::gradients((&y * by_result(&y)?)?.sum_all()?, vars)?;
    let gradients = vars[..network.weights().count()].iter().filter_map(|var| found.remove(var));
    Ok(std::iter::once(y.detach()).chain(gradients).collect())
}

/// The same by passes on the kernels.
pub fn passed(runs: &Runs, network: &Network, x: &Tensor) -> candle_core::Result<Vec<Tensor>> {
    let (y, forward) = runs.forward(network, x)?;
    let gradients = runs.backward(network, x, &forward, &by_result(&y)?)?;
    Ok(std::iter::once(y).chain(gradients).collect())
}

/// How far tensors are from others that were computed in f32, themselves in `precision`, as [`Outcome::error`] has it, and how far they
/// may be.
pub fn apart(found: &[Tensor], expected: &[Tensor], precision: Precision) -> Result<[f64; 2]> {
    let mut worst = if found.len() == expected.len() { 0f64 } else { f64::INFINITY };
    for (found, expected) in found.iter().zip(expected) {
        let wide: Vec<f64> = read(expected)?.into_iter().map(f64::from).collect();
        worst = worst.max(error(&read(found)?, &wide));
    }
    // Sums of up to 48 products of order 1 through seven layers, in f32 or with results rounded by up to 1/512 in each.
    Ok([worst, if precision == Precision::Bf16 { 3e-2 } else { 5e-5 }])
}

/// Three passes forward and backward in `precision`, which products are computed in already, with other pictures and other weights each
/// time; all but the first have to be recorded ones.
///
/// # Errors
/// Those of candle.
pub fn recorded_passes(device: &Device, precision: Precision) -> Result<Vec<Outcome>> {
    let (vars, cpus, runs) = (weights(device, precision)?, weights(&Device::Cpu, precision)?, Runs::default());
    let (on_device, on_cpu) = (network(&vars, false)?, network(&cpus, false)?);
    let mut outcomes = Vec::new();
    for pass in 0..3 {
        let found = passed(&runs, &on_device, &pictures(pass, 3, device)?)?;
        let expected = composed(&cpus, &on_cpu, &pictures(pass, 3, &Device::Cpu)?)?;
        let as_wanted = runs.recorded() == usize::from(pass > 0);
        let [error, tolerance] = apart(&found, &expected, precision)?;
        let error = if as_wanted { error } else { f64::INFINITY };
        let how = if pass == 0 { "asked for" } else { "recorded" };
        let name = format!("network of convolutions in {precision:?}, {how}, pass {}", pass + 1);
        outcomes.push(Outcome { name, error, tolerance });
        for vars in [&vars, &cpus] {
            vars.iter().try_for_each(|var| var.set(&(var.as_tensor() * 0.99)?))?;
        }
    }
    Ok(outcomes)
}
