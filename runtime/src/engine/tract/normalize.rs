//! LayerNorm, with the sum before it, as an operator of tract's.

use std::sync::Arc;

use tract_onnx::Onnx;
use tract_onnx::model::ParsingContext;
use tract_onnx::pb::NodeProto;
use tract_onnx::prelude::*;
use tract_onnx::tract_core::broadcast::multi_broadcast;
use tract_onnx::tract_core::ops::change_axes::wire_rank_broadcast;
use tract_onnx::tract_core::ops::math::add;
use tract_onnx::tract_hir::internal::*;

use super::linear::floats;
use crate::kernels::LayerNorm;

/// Name of the operator in the graphs that the engine gives to tract; no file holds it. One input `[…, width]`, or two that are added
/// first, broadcast as `Add` does it.
pub(in crate::engine) const OPERATOR: &str = "UnimoLayerNorm";

/// Makes the operator known.
pub(super) fn register(onnx: &mut Onnx) {
    onnx.op_register.insert(OPERATOR, build);
}

/// Reads the attributes `weight` and `bias` (both `[width]`) and `epsilon`.
fn build(_: &ParsingContext, node: &NodeProto) -> TractResult<(Box<dyn InferenceOp>, Vec<String>)> {
    let attribute = |name: &str| {
        let found = node.attribute.iter().find(|attribute| attribute.name == name);
        found.with_context(|| format!("a LayerNorm without {name}"))
    };
    let vector = |name: &str| TractResult::Ok(floats(attribute(name)?.t.as_ref().context("a vector that is none")?));
    let norm = LayerNorm::new(vector("weight")?, vector("bias")?, attribute("epsilon")?.f);
    Ok((expand(Normalize(Arc::new(norm.context("weights of another size")?))), vec![]))
}

#[derive(Debug, Clone, PartialEq)]
struct Normalize(Arc<LayerNorm>);

// The weights are compared by value, and are numbers.
impl Eq for Normalize {}

/// Whether rows of one shape can be added to those of another by going through them over and over.
fn repeats(shape: &[TDim], whole: &[TDim]) -> bool {
    let ones = shape.iter().take_while(|&size| *size == 1.to_dim()).count();
    let shape = &shape[ones..];
    !shape.is_empty() && whole.ends_with(shape)
}

impl Expansion for Normalize {
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
        for input in inputs {
            solver.equals(&input.datum_type, f32::datum_type())?;
        }
        solver.equals(&outputs[0].datum_type, f32::datum_type())?;
        match inputs {
            [x] => solver.equals(&x.shape, &outputs[0].shape),
            [a, b] => solver
                .given_2(&a.shape, &b.shape, move |solver, a, b| solver.equals(&outputs[0].shape, multi_broadcast(&[a, b])?)),
            _ => bail!("a LayerNorm of {} inputs", inputs.len()),
        }
    }

    fn wire(&self, prefix: &str, model: &mut TypedModel, inputs: &[OutletId]) -> TractResult<TVec<OutletId>> {
        let &[a, b] = inputs else { return model.wire_node(prefix, self.clone(), inputs) };
        let shape = |input| TractResult::Ok(model.outlet_fact(input)?.shape.to_tvec());
        let [of_a, of_b] = [shape(a)?, shape(b)?];
        let whole = multi_broadcast(&[&of_a, &of_b])?;
        if of_a == whole && repeats(&of_b, &whole) {
            model.wire_node(prefix, self.clone(), &[a, b])
        } else if of_b == whole && repeats(&of_a, &whole) {
            model.wire_node(prefix, self.clone(), &[b, a])
        } else {
            let same_rank = wire_rank_broadcast(prefix, model, inputs)?;
            let sum = model.wire_node(format!("{prefix}.sum"), add(), &same_rank)?;
            model.wire_node(prefix, self.clone(), &sum)
        }
    }
}

impl Op for Normalize {
    fn name(&self) -> StaticName {
        OPERATOR.into()
    }

    op_as_typed_op!();
}

impl EvalOp for Normalize {
    op_out_of_plan!();

    fn eval(&self, _: &EvalContext, mut inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        let add = if inputs.len() > 1 { inputs.pop() } else { None };
        // Where nobody else reads them, the rows are normalized in their place.
        let mut rows = args_1!(inputs).into_tensor();
        let add = add.as_ref().map(|add| add.try_as_plain_ram()).transpose()?;
        let add = add.as_ref().map(|add| add.as_slice::<f32>()).transpose()?;
        self.0.normalize(rows.try_as_plain_ram_mut()?.as_slice_mut::<f32>()?, add);
        Ok(tvec!(rows.into_tvalue()))
    }
}

impl TypedOp for Normalize {
    as_op!();

    fn output_facts(&self, inputs: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        let rows = inputs[0].shape.to_tvec();
        ensure!(rows.last() == Some(&self.0.width().to_dim()), "a LayerNorm of {} over {rows:?}", self.0.width());
        ensure!(inputs.iter().skip(1).all(|add| repeats(&add.shape.to_tvec(), &rows)), "rows of other sizes are added");
        Ok(tvec!(f32::fact(rows)))
    }
}
