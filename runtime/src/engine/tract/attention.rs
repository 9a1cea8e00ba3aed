//! Attention over stacked caches as an operator of tract's.

use tract_onnx::Onnx;
use tract_onnx::model::ParsingContext;
use tract_onnx::pb::NodeProto;
use tract_onnx::prelude::*;
use tract_onnx::tract_hir::internal::*;

use crate::kernels::{Cache, CachedAttention};

/// Name of the operator in the graphs that the engine gives to tract; no file holds it. Inputs: queries, keys and values
/// `[rows, 3 · heads · depth]`; prefix keys and values `[layers, heads, tokens, depth]`; past keys and values
/// `[layers, heads, slots, depth]`; mask `[rows, slots]`. Output: `[rows, heads · depth]`.
pub(in crate::engine) const OPERATOR: &str = "UnimoCachedAttention";

/// Makes the operator known.
pub(super) fn register(onnx: &mut Onnx) {
    onnx.op_register.insert(OPERATOR, build);
}

/// Reads the attributes `layer` and `scale`.
fn build(_: &ParsingContext, node: &NodeProto) -> TractResult<(Box<dyn InferenceOp>, Vec<String>)> {
    let attribute = |name: &str| {
        let found = node.attribute.iter().find(|attribute| attribute.name == name);
        found.with_context(|| format!("an attention without {name}"))
    };
    let attention = Attention { layer: usize::try_from(attribute("layer")?.i)?, scale: attribute("scale")?.f };
    Ok((expand(attention), vec![]))
}

#[derive(Debug, Clone)]
struct Attention {
    layer: usize,
    scale: f32,
}

impl PartialEq for Attention {
    fn eq(&self, other: &Self) -> bool {
        self.layer == other.layer && self.scale.to_bits() == other.scale.to_bits()
    }
}

impl Eq for Attention {}

fn shape(qkv: &[TDim]) -> TractResult<TVec<TDim>> {
    let mut shape: TVec<TDim> = qkv.into();
    let last = shape.last_mut().context("queries without an axis")?;
    *last = last.clone() / 3;
    Ok(shape)
}

impl Expansion for Attention {
    fn name(&self) -> StaticName {
        OPERATOR.into()
    }

    fn rules<'r, 'p: 'r, 's: 'r>(
        &'s self,
        solver: &mut Solver<'r>,
        inputs: &'p [TensorProxy],
        outputs: &'p [TensorProxy],
    ) -> InferenceResult {
        check_input_arity(inputs, 6)?;
        check_output_arity(outputs, 1)?;
        for input in inputs {
            solver.equals(&input.datum_type, f32::datum_type())?;
        }
        solver.equals(&outputs[0].datum_type, f32::datum_type())?;
        solver.given(&inputs[0].shape, move |solver, qkv| solver.equals(&outputs[0].shape, shape(&qkv)?))
    }

    fn wire(&self, prefix: &str, model: &mut TypedModel, inputs: &[OutletId]) -> TractResult<TVec<OutletId>> {
        model.wire_node(prefix, self.clone(), inputs)
    }
}

impl Op for Attention {
    fn name(&self) -> StaticName {
        OPERATOR.into()
    }

    op_as_typed_op!();
}

impl EvalOp for Attention {
    op_out_of_plan!();

    fn eval(&self, _: &EvalContext, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        let (&[rows, width], &[_, heads, _, depth]) = (inputs[0].shape(), inputs[1].shape()) else {
            bail!("attention over {:?} and {:?}", inputs[0].shape(), inputs[1].shape())
        };
        ensure!(width == 3 * heads * depth, "{width} values a row for {heads} heads of {depth}");
        let views = inputs.iter().map(|input| input.try_as_plain_ram()).collect::<TractResult<TVec<_>>>()?;
        let floats = |input: usize| views[input].as_slice::<f32>();
        let layer = |input: usize| -> TractResult<&[f32]> {
            let size = inputs[input].shape()[1..].iter().product::<usize>();
            floats(input)?.get(self.layer * size..(self.layer + 1) * size).context("a cache without this layer")
        };
        let mut output = Tensor::zero::<f32>(&[rows, heads * depth])?;
        let attention = CachedAttention {
            heads,
            depth,
            scale: self.scale,
            qkv: floats(0)?,
            prefix: Cache { keys: layer(1)?, values: layer(2)? },
            past: Cache { keys: layer(3)?, values: layer(4)? },
            mask: floats(5)?,
        };
        attention.read(output.try_as_plain_ram_mut()?.as_slice_mut::<f32>()?);
        Ok(tvec!(output.into_tvalue()))
    }
}

impl TypedOp for Attention {
    as_op!();

    fn output_facts(&self, inputs: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        let dims = |input: usize| inputs[input].shape.to_tvec();
        let (prefix, past, mask) = (dims(1), dims(3), dims(5));
        let fits = prefix.len() == 4
            && past.len() == 4
            && dims(2) == prefix
            && dims(4) == past
            && [&prefix[0], &prefix[1], &prefix[3]] == [&past[0], &past[1], &past[3]]
            && mask.last() == Some(&past[2]);
        ensure!(fits, "caches {prefix:?}, {past:?} and a mask {mask:?} of other sizes");
        Ok(tvec!(f32::fact(shape(&dims(0))?)))
    }
}
