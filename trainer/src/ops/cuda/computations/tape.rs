//! What is computed of arrays, one operator after another, put down before it is done: done by a machine, forward and backward, it asks
//! for the same work whenever it was put down alike, at places that do not move. So it can be recorded.

use std::cell::RefCell;
use std::fmt::{Debug, Write};
use std::ops::Range;

use candle_core::{Result, Shape, Tensor};

use super::super::Precision;
use super::super::contrast::{BoundedExp, LogShares, UnitRows};
use super::super::cross_entropy::TiedCrossEntropy;
use super::super::cross_modal::CrossModal;
use super::super::elementwise::{Dropout, Gelu, Relu, Scaled, add_to};
use super::super::layer_norm::OfOne;
use super::super::linear::Alone;
use super::super::losses::Loss;
use super::super::machine::{Address, Element, Machine};
use super::super::operator::{Array, Input, Operator, Pass};
use super::super::pooling::{FirstAndMean, ReluProduct};
use super::super::rows::SomeRows;
use super::NAME;
use crate::ops::contrast::check as check_numbers;
use crate::ops::pooling::check as check_counts;
use crate::ops::{Operators, Relations, Scores, Targets};

/// An operator on a machine.
trait On<M: Machine>: Send {
    fn forward(&self, machine: &M, inputs: &[Input]) -> Result<(M::Values, Shape)>;
    fn backward(&self, machine: &M, pass: &Pass) -> Result<Vec<Option<M::Values>>>;
    /// All that it is but for what varies from step to step.
    fn description(&self) -> String;
}

impl<M: Machine, O: Operator + Debug> On<M> for O {
    fn forward(&self, machine: &M, inputs: &[Input]) -> Result<(M::Values, Shape)> {
        Operator::forward(self, machine, inputs)
    }

    fn backward(&self, machine: &M, pass: &Pass) -> Result<Vec<Option<M::Values>>> {
        Operator::backward(self, machine, pass)
    }

    fn description(&self) -> String {
        format!("{}: {self:?}", O::NAME)
    }
}

/// Where the values of an array come from.
enum Source<M: Machine> {
    /// They are given, as the array of this number.
    Given(usize),
    Weight(Tensor),
    /// They lie among the words from here on.
    Told(usize),
    /// They are computed of arrays, and of so many words from here on.
    Made {
        operator: Box<dyn On<M>>,
        of: Vec<usize>,
        told: Option<(usize, usize)>,
    },
}

struct Entry<M: Machine> {
    source: Source<M>,
    shape: Shape,
    /// Rows that count, the first ones. Others fill up, so that shapes repeat.
    counted: usize,
    /// Whether a gradient by it leads anywhere.
    wanted: bool,
}

/// An array on a tape.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place(usize);

/// What is put down.
pub struct Tape<M: Machine> {
    entries: RefCell<Vec<Entry<M>>>,
    /// What operators are told.
    words: RefCell<Vec<u32>>,
    precision: Precision,
}

/// An array that a tape is given: its shape, filled up; how many of its rows count; and whether a gradient by it leads anywhere.
#[derive(Debug, Clone)]
pub struct Leaf {
    pub shape: (usize, usize),
    pub counted: usize,
    pub wanted: bool,
}

/// What a forward pass has left: of every array where it lies, and the memory of those that were made.
pub struct Computed<M: Machine> {
    inputs: Vec<Input>,
    made: Vec<Option<Array<M>>>,
}

impl<M: Machine> Computed<M> {
    /// Where an array lies.
    pub fn input(&self, Place(place): Place) -> &Input {
        &self.inputs[place]
    }
}

/// A gradient, which may lie in someone else's memory.
enum By<M: Machine> {
    Lent(Input),
    Own(Array<M>),
}

impl<M: Machine> By<M> {
    fn input(&self) -> Input {
        match self {
            Self::Lent(input) => input.clone(),
            Self::Own(array) => array.input(),
        }
    }
}

/// Gradients by what a tape began with.
pub struct Gradients<M: Machine> {
    /// By weights, which these are.
    pub by_weights: Vec<(Tensor, Array<M>)>,
    /// By the arrays of these numbers, where they lead anywhere.
    pub by_given: Vec<(usize, Array<M>)>,
}

impl<M: Machine> Tape<M> {
    /// With products computed in that.
    pub fn new(precision: Precision) -> Self {
        Self { entries: RefCell::default(), words: RefCell::default(), precision }
    }

    fn put(&self, source: Source<M>, shape: Shape, counted: usize, wanted: bool) -> Place {
        let mut entries = self.entries.borrow_mut();
        entries.push(Entry { source, shape, counted, wanted });
        Place(entries.len() - 1)
    }

    /// An array that will be given.
    pub fn given(&self, number: usize, leaf: &Leaf) -> Place {
        self.put(Source::Given(number), leaf.shape.into(), leaf.counted, leaf.wanted)
    }

    /// Puts down words, and gives their place, which is one of sixteen bytes.
    pub fn tell(&self, words: &[u32]) -> usize {
        let mut all = self.words.borrow_mut();
        let first = all.len().next_multiple_of(4);
        all.resize(first, 0);
        all.extend(words);
        first
    }

    /// All of them.
    pub fn words(&self) -> Vec<u32> {
        self.words.borrow().clone()
    }

    fn place_of(&self, weight: &Tensor) -> Place {
        let known = |entry: &Entry<M>| matches!(&entry.source, Source::Weight(known) if known.id() == weight.id());
        if let Some(place) = self.entries.borrow().iter().position(known) {
            return Place(place);
        }
        let rows = weight.dims().first().copied().unwrap_or(1);
        self.put(Source::Weight(weight.clone()), weight.shape().clone(), rows, weight.track_op())
    }

    /// Shape of an array, and how many of its rows count.
    fn shape_of(&self, Place(place): Place) -> (Shape, usize) {
        let entry = &self.entries.borrow()[place];
        (entry.shape.clone(), entry.counted)
    }

    /// Rows and width of an array, and how many of its rows count.
    fn rows(&self, place: Place) -> Result<(usize, usize, usize)> {
        let (shape, counted) = self.shape_of(place);
        let (rows, width) = shape.dims2()?;
        Ok((rows, width, counted))
    }

    /// Rows and width of an array of which all rows count.
    fn whole(&self, place: Place) -> Result<(usize, usize)> {
        match self.rows(place)? {
            (rows, width, counted) if rows == counted => Ok((rows, width)),
            (rows, _, counted) => candle_core::bail!("{NAME}: {counted} of {rows} rows count where all of them would"),
        }
    }

    /// Whether all rows of an array count.
    pub fn is_whole(&self, place: Place) -> bool {
        let (shape, counted) = self.shape_of(place);
        !matches!(shape.dims(), [rows, _] if *rows != counted)
    }

    /// Puts down an operator of arrays and words, with the shape of its result and how many of its rows count.
    fn make(
        &self,
        operator: impl Operator + Debug,
        of: &[Place],
        words: &[u32],
        shape: impl Into<Shape>,
        counted: usize,
    ) -> Place {
        let of: Vec<usize> = of.iter().map(|place| place.0).collect();
        let wanted = of.iter().any(|&place| self.entries.borrow()[place].wanted);
        let told = (!words.is_empty()).then(|| (self.tell(words), words.len()));
        self.put(Source::Made { operator: Box::new(operator), of, told }, shape.into(), counted, wanted)
    }

    /// All that has to be the same for what is recorded of one tape to do for another: everything but the words, and where weights lie.
    pub fn description(&self, machine: &M) -> Result<String> {
        let mut all = format!("{:?}", self.precision);
        for Entry { source, shape, counted: _, wanted } in &*self.entries.borrow() {
            let what = match source {
                Source::Given(number) => format!("given {number}"),
                Source::Weight(weight) => format!("weight at {:?}", machine.place(NAME, weight)?.at),
                Source::Told(first) => format!("words from {first}"),
                Source::Made { operator, of, told } => format!("{} of {of:?}, told {told:?}", operator.description()),
            };
            // Writing to a string does not fail.
            let _ = write!(all, "; {what}: {:?} {wanted}", shape.dims());
        }
        Ok(all)
    }

    /// Asks for all of it, of the given arrays and of words at an address.
    ///
    /// # Errors
    /// Those of the operators.
    pub fn forward(&self, machine: &M, given: &[Input], words: Address) -> Result<Computed<M>> {
        let mut computed = Computed { inputs: Vec::new(), made: Vec::new() };
        for Entry { source, shape, wanted, .. } in &*self.entries.borrow() {
            let mut made = None;
            let at = match source {
                Source::Given(number) => given[*number].at,
                Source::Weight(weight) => machine.place(NAME, weight)?.at,
                Source::Told(first) => words.after(*first),
                Source::Made { operator, of, told } => {
                    let (values, of_result) = operator.forward(machine, &computed.inputs_of(of, *told, words))?;
                    if of_result.elem_count() != shape.elem_count() {
                        candle_core::bail!("{NAME}: {} made {of_result:?}, not {shape:?}", operator.description());
                    }
                    let at = machine.at(&values);
                    made = Some(Array::new(machine, (values, shape.clone()), Element::F32));
                    at
                }
            };
            computed.inputs.push(Input { wanted: *wanted, ..Input::at(at, shape.clone()) });
            computed.made.push(made);
        }
        Ok(computed)
    }

    /// Asks for gradients, of those by some arrays, and gives back the memory of what is not among `kept`.
    ///
    /// # Errors
    /// Those of the operators.
    pub fn backward(
        &self,
        machine: &M,
        computed: &mut Computed<M>,
        seeds: &[(Place, Address)],
        words: Address,
        kept: &[Place],
    ) -> Result<Gradients<M>> {
        let entries = self.entries.borrow();
        let mut by: Vec<Option<By<M>>> = entries.iter().map(|_| None).collect();
        for &(Place(place), at) in seeds {
            by[place] = Some(By::Lent(Input { at, ..computed.inputs[place].clone() }));
        }
        for (place, Entry { source, .. }) in entries.iter().enumerate().rev() {
            let Source::Made { operator, of, told } = source else { continue };
            if let Some(gradient) = by[place].take().filter(|_| entries[place].wanted) {
                let inputs = computed.inputs_of(of, *told, words);
                let pass = Pass { inputs: &inputs, result: &computed.inputs[place], gradient: &gradient.input() };
                for (&number, values) in of.iter().zip(operator.backward(machine, &pass)?) {
                    if let (Some(values), true) = (values, entries[number].wanted) {
                        let shape = entries[number].shape.clone();
                        add(machine, &mut by[number], Array::new(machine, (values, shape), Element::F32))?;
                    }
                }
            }
            if !kept.contains(&Place(place)) {
                computed.made[place] = None;
            }
        }
        let mut found = Gradients { by_weights: Vec::new(), by_given: Vec::new() };
        for (Entry { source, .. }, by) in entries.iter().zip(by) {
            match (source, by) {
                (Source::Given(number), Some(By::Own(by))) => found.by_given.push((*number, by)),
                (Source::Weight(weight), Some(By::Own(by))) => found.by_weights.push((weight.clone(), by)),
                _ => {}
            }
        }
        Ok(found)
    }
}

impl<M: Machine> Computed<M> {
    /// Inputs of an operator.
    fn inputs_of(&self, of: &[usize], told: Option<(usize, usize)>, words: Address) -> Vec<Input> {
        let arrays = of.iter().map(|&place| self.inputs[place].clone());
        arrays.chain(told.map(|(first, count)| Input::told(words.after(first), count))).collect()
    }
}

/// Adds a gradient to what there is.
fn add<M: Machine>(machine: &M, to: &mut Option<By<M>>, by: Array<M>) -> Result<()> {
    let sum = match to.take() {
        None => by,
        Some(so_far) => {
            let (so_far, sum) = (so_far.input(), by.input());
            add_to(machine, &so_far, sum.at)?;
            by
        }
    };
    *to = Some(By::Own(sum));
    Ok(())
}

impl<M: Machine> Operators for Tape<M> {
    type Array = Place;

    fn weight(&self, weight: &Tensor) -> Place {
        self.place_of(weight)
    }

    fn scaled(&self, x: &Place, factor: f64) -> Result<Place> {
        let (shape, counted) = self.shape_of(*x);
        Ok(self.make(Scaled { factor: factor as f32 }, &[*x], &[], shape, counted))
    }

    fn constants(&self, values: Vec<f32>, shape: (usize, usize)) -> Result<Place> {
        if values.len() != shape.0 * shape.1 {
            candle_core::bail!("{} values for {shape:?}", values.len());
        }
        let words: Vec<u32> = values.into_iter().map(f32::to_bits).collect();
        Ok(self.put(Source::Told(self.tell(&words)), shape.into(), shape.0, false))
    }

    fn some_rows(&self, x: &Place, rows: Range<usize>) -> Result<Place> {
        let (all, width) = self.whole(*x)?;
        if rows.start > rows.end || rows.end > all {
            candle_core::bail!("rows {rows:?} of {all}");
        }
        Ok(self.make(SomeRows { first: rows.start, rows: rows.len() }, &[*x], &[], (rows.len(), width), rows.len()))
    }

    fn linear(&self, x: &Place, weight: &Tensor, bias: &Tensor) -> Result<Place> {
        let ((rows, _, counted), outputs) = (self.rows(*x)?, weight.dim(0)?);
        Ok(self.make(Alone::of(self.precision), &[*x, self.place_of(weight), self.place_of(bias)], &[], (rows, outputs), counted))
    }

    fn linear_gelu(&self, x: &Place, weight: &Tensor, bias: &Tensor) -> Result<Place> {
        let ((rows, _, counted), outputs) = (self.rows(*x)?, weight.dim(0)?);
        let product = self.make(Alone::of(self.precision), &[*x, self.place_of(weight)], &[], (rows, outputs), counted);
        Ok(self.make(Gelu, &[product, self.place_of(bias)], &[], (rows, outputs), counted))
    }

    fn layer_norm(&self, x: &Place, weight: &Tensor, bias: &Tensor, eps: f32) -> Result<Place> {
        let (rows, width, counted) = self.rows(*x)?;
        Ok(self.make(OfOne::of(eps), &[*x, self.place_of(weight), self.place_of(bias)], &[], (rows, width), counted))
    }

    fn dropout(&self, x: &Place, rate: f32, seed: u32) -> Result<Place> {
        if rate == 0.0 {
            return Ok(*x);
        }
        let (rows, width, counted) = self.rows(*x)?;
        Ok(self.make(Dropout { keep: 1.0 - rate }, &[*x], &[seed], (rows, width), counted))
    }

    fn relu(&self, x: &Place) -> Result<Place> {
        let (rows, width, counted) = self.rows(*x)?;
        Ok(self.make(Relu, &[*x], &[], (rows, width), counted))
    }

    fn relu_product(&self, a: &Place, b: &Place) -> Result<Place> {
        let (rows, width, counted) = self.rows(*a)?;
        if self.rows(*b)? != (rows, width, counted) {
            candle_core::bail!("relu_product: {:?} and {:?}", self.rows(*a)?, self.rows(*b)?);
        }
        Ok(self.make(ReluProduct, &[*a, *b], &[], (rows, width), counted))
    }

    fn first_and_mean(&self, x: &Place, counts: &[usize]) -> Result<Place> {
        let ((rows, width, counted), texts) = (self.rows(*x)?, counts.len());
        check_counts(counts, counted)?;
        Ok(self.make(FirstAndMean { texts }, &[*x], &FirstAndMean::words(counts, rows), (texts, 2 * width), texts))
    }

    fn unit_rows(&self, x: &Place) -> Result<Place> {
        let (rows, width, counted) = self.rows(*x)?;
        Ok(self.make(UnitRows, &[*x], &[], (rows, width), counted))
    }

    fn scalar_products(&self, a: &Place, b: &Place) -> Result<Place> {
        let ((rows, _), (columns, _)) = (self.whole(*a)?, self.whole(*b)?);
        Ok(self.make(Alone::of(Precision::F32), &[*a, *b], &[], (rows, columns), rows))
    }

    fn bounded_exp(&self, x: &Tensor, bounds: [f32; 2]) -> Result<Place> {
        let place = self.place_of(x);
        Ok(self.make(BoundedExp { bounds }, &[place], &[], x.shape().clone(), 1))
    }

    fn log_shares(&self, scores: &Place, temperature: &Place, numbers: [&[u32]; 2], [least, factor]: [f64; 2]) -> Result<Place> {
        let (rows, columns) = self.whole(*scores)?;
        check_numbers([rows, columns], numbers)?;
        let op = LogShares { least: least as f32, factor: factor as f32 };
        Ok(self.make(op, &[*scores, *temperature], &numbers.concat(), (), 1))
    }

    fn cross_modal(&self, scores: &Scores<Place>, temperature: &Place, relations: &Relations, factor: f64) -> Result<Place> {
        let (mut sizes, mut of) = ([None; 5], Vec::new());
        for (size, scores) in sizes.iter_mut().zip(scores.all()) {
            if let Some(&scores) = scores {
                *size = Some(self.whole(scores)?);
                of.push(scores);
            }
        }
        relations.check(sizes)?;
        of.push(*temperature);
        let op = CrossModal { factor: factor as f32, there: sizes.map(|size| size.is_some()) };
        Ok(self.make(op, &of, &CrossModal::words(relations), (), 1))
    }

    fn soft_cross_entropy(&self, logits: &Place, targets: &Place) -> Result<Place> {
        self.loss(Loss::SOFT, *logits, *targets)
    }

    fn binary_cross_entropy(&self, logits: &Place, targets: &Place) -> Result<Place> {
        self.loss(Loss::BINARY, *logits, *targets)
    }

    fn squared_error(&self, x: &Place, targets: &Place) -> Result<Place> {
        self.loss(Loss::SQUARED, *x, *targets)
    }

    fn tied_cross_entropy(&self, hidden: &Place, weight: &Tensor, bias: &Place, targets: &Targets) -> Result<Place> {
        let ((rows, _, counted), classes, parts) = (self.rows(*hidden)?, weight.dim(0)?, targets.parts.len());
        targets.check(counted, classes)?;
        let op = TiedCrossEntropy::of(parts, classes, self.precision);
        let of = [*hidden, self.place_of(weight), *bias];
        Ok(self.make(op, &of, &TiedCrossEntropy::words(targets, rows), 1 + parts, 1 + parts))
    }
}

impl<M: Machine> Tape<M> {
    fn loss(&self, kernel: &'static str, x: Place, targets: Place) -> Result<Place> {
        let (of_x, of_targets) = (self.rows(x)?, self.rows(targets)?);
        // Targets of rows that only fill up are not read.
        if (of_x.1, of_x.2) != (of_targets.1, of_targets.2) || of_x.2 == 0 {
            candle_core::bail!("{kernel}: {of_x:?} and targets of {of_targets:?}");
        }
        let op = Loss::of(kernel);
        let words = op.words(of_x.2, of_x.1);
        Ok(self.make(op, &[x, targets], &words, (), 1))
    }
}
