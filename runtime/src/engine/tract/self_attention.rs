//! Attention of rows over each other as an operator of tract's.

use tract_onnx::Onnx;
use tract_onnx::model::ParsingContext;
use tract_onnx::pb::NodeProto;
use tract_onnx::prelude::*;
use tract_onnx::tract_hir::internal::*;

use crate::kernels::SelfAttention as Kernel;

/// Name of the operator in the graphs that the engine gives to tract; no file holds it. Inputs: queries, keys and values
/// `[rows, 3 · heads · depth]`, and perhaps a mask `[1, rows]`. Output: `[rows, heads · depth]`.
pub(in crate::engine) const OPERATOR: &str = "UnimoSelfAttention";

/// Makes the operator known.
pub(super) fn register(onnx: &mut Onnx) {
    onnx.op_register.insert(OPERATOR, build);
}

/// Reads the attributes `heads`, `depth` and `scale`.
fn build(_: &ParsingContext, node: &NodeProto) -> TractResult<(Box<dyn InferenceOp>, Vec<String>)> {
    let attribute = |name: &str| {
        let found = node.attribute.iter().find(|attribute| attribute.name == name);
        found.with_context(|| format!("an attention without {name}"))
    };
    let size = |name: &str| TractResult::Ok(usize::try_from(attribute(name)?.i)?);
    Ok((expand(SelfAttention { heads: size("heads")?, depth: size("depth")?, scale: attribute("scale")?.f }), vec![]))
}

#[derive(Debug, Clone)]
struct SelfAttention {
    heads: usize,
    depth: usize,
    scale: f32,
}

impl PartialEq for SelfAttention {
    fn eq(&self, other: &Self) -> bool {
        (self.heads, self.depth, self.scale.to_bits()) == (other.heads, other.depth, other.scale.to_bits())
    }
}

impl Eq for SelfAttention {}

impl SelfAttention {
    fn shape(&self, qkv: &[TDim]) -> TractResult<TVec<TDim>> {
        let hidden = self.heads * self.depth;
        match qkv {
            [rows, width] if *width == (3 * hidden).to_dim() => Ok(tvec!(rows.clone(), hidden.to_dim())),
            _ => bail!("{} heads of {} over {qkv:?}", self.heads, self.depth),
        }
    }
}

impl Expansion for SelfAttention {
    fn name(&self) -> StaticName {
        OPERATOR.into()
    }

    fn rules<'r, 'p: 'r, 's: 'r>(
        &'s self,
        solver: &mut Solver<'r>,
        inputs: &'p [TensorProxy],
        outputs: &'p [TensorProxy],
    ) -> InferenceResult {
        check_output_arity(outputs, 1)?;
        ensure!((1..=2).contains(&inputs.len()), "an attention of {} inputs", inputs.len());
        for input in inputs {
            solver.equals(&input.datum_type, f32::datum_type())?;
        }
        solver.equals(&outputs[0].datum_type, f32::datum_type())?;
        solver.given(&inputs[0].shape, move |solver, qkv| solver.equals(&outputs[0].shape, self.shape(&qkv)?))
    }

    fn wire(&self, prefix: &str, model: &mut TypedModel, inputs: &[OutletId]) -> TractResult<TVec<OutletId>> {
        model.wire_node(prefix, self.clone(), inputs)
    }
}

impl Op for SelfAttention {
    fn name(&self) -> StaticName {
        OPERATOR.into()
    }

    op_as_typed_op!();
}

impl EvalOp for SelfAttention {
    op_out_of_plan!();

    fn eval(&self, _: &EvalContext, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        let views = inputs.iter().map(|input| input.try_as_plain_ram()).collect::<TractResult<TVec<_>>>()?;
        let mask = views.get(1).map(|mask| mask.as_slice::<f32>()).transpose()?;
        let kernel = Kernel { heads: self.heads, depth: self.depth, scale: self.scale, qkv: views[0].as_slice::<f32>()?, mask };
        let read = kernel.read().context("an attention over rows of another size")?;
        let hidden = self.heads * self.depth;
        Ok(tvec!(Tensor::from_shape(&[read.len() / hidden, hidden], &read)?.into_tvalue()))
    }
}

impl TypedOp for SelfAttention {
    as_op!();

    fn output_facts(&self, inputs: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        let qkv = inputs[0].shape.to_tvec();
        if let Some(mask) = inputs.get(1) {
            ensure!(*mask.shape.to_tvec() == [1.to_dim(), qkv[0].clone()], "a mask {:?} of rows {qkv:?}", mask.shape);
        }
        Ok(tvec!(f32::fact(self.shape(&qkv)?)))
    }
}
