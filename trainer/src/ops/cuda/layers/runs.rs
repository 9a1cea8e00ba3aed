//! Passes through the layers, on memory that stays, and their recordings.

use candle_core::{Result, Shape, Tensor};

use super::super::attention::Attention;
use super::super::attention_tables::{Placed, filled};
use super::super::gathering::Gathering;
use super::super::machine::{Address, Element};
use super::super::operator::Input;
use super::super::recording::{Records, Reserved};
use super::super::{Precision, copy, fill_rows, round_to, widen_to};
use super::embedding::Embedded;
use super::stack::{Array, ByWeights, Left, Matrices, Stack};
use super::{ByEmbedding, Forward, Gradients, NAME, WEIGHTS};

/// How many forward passes there were.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// All of them.
    pub passes: u64,
    /// Those that were replayed.
    pub replayed: u64,
    /// Recordings that were made.
    pub recordings: u64,
}

/// All that has to be the same for a recording to do for another pass.
#[derive(Clone, PartialEq)]
struct Use {
    /// Rows, filled up, and their width.
    shape: (usize, usize),
    /// Of the attention's tables, filled up.
    lengths: [usize; 3],
    heads: usize,
    eps: f32,
    rate: f32,
    precision: Precision,
    first_kept: usize,
    checkpointing: bool,
    input_wanted: bool,
    /// Where the weights lie, and whether they are trained.
    weights: Vec<(Address, bool)>,
}

impl Use {
    /// What activations are stored as.
    fn element(&self) -> Element {
        Element::of(self.precision)
    }
}

/// What has been done of a use.
enum Stage<M: Records> {
    /// What is done for the first time is not recorded: it may never be done again, and a device loads kernels when they are first used.
    First,
    /// It was done both ways.
    Done,
    Recorded(Box<Recorded<M>>),
}

struct OneUse<M: Records> {
    used_as: Use,
    /// Tables and seeds of the last pass.
    words: M::Words,
    stage: Stage<M>,
}

/// A use of the layers as recordings, on memory that is theirs while they are done.
struct Recorded<M: Records> {
    input: Input,
    result: Input,
    by_result: Input,
    by_input: Option<Input>,
    forward: M::Recording,
    /// Layers on the way back, the last one first.
    backward: Vec<RecordedLayer<M>>,
    _pieces: Option<M::Words>,
}

struct RecordedLayer<M: Records> {
    number: usize,
    backward: M::Recording,
    numbers: Vec<usize>,
    gathering: Gathering<M>,
}

/// The forward pass that was done last.
struct Last<M: Records> {
    number: u64,
    embedded: Embedded<M>,
    /// What it has left, where it was no recording.
    asked: Option<Asked<M>>,
}

/// Matrices, and where it is told how they are rounded.
struct Laid<M: Records> {
    matrices: Matrices<Reserved<M>>,
    pieces: Option<M::Words>,
}

struct Asked<M: Records> {
    attention: Attention,
    laid: Laid<M>,
    left: Vec<Left<Reserved<M>>>,
}

/// Passes on one machine. All of them, recorded or not, take turns on the same memory.
pub struct Engine<M: Records> {
    /// For work that is recorded.
    machine: M,
    memory: Reserved<M>,
    /// Rows that it was for, at most.
    most_rows: usize,
    /// The one that was used last is the last.
    uses: Vec<OneUse<M>>,
    last: Option<Last<M>>,
    counts: Counts,
    /// The machine does not record.
    refuses: bool,
}

impl<M: Records> Engine<M> {
    pub fn new(machine: M) -> Self {
        let memory = Reserved::of(&machine);
        Self { machine, memory, most_rows: 0, uses: Vec::new(), last: None, counts: Counts::default(), refuses: false }
    }

    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// The last layer's result. The pass is told its number.
    pub fn forward(&mut self, pass: &mut Forward) -> Result<Tensor> {
        // What another pass has left is given back.
        self.last = None;
        let (used_as, attention, words) = self.told(pass)?;
        self.make_room(used_as.shape.0);
        let mut one = self.take_out(used_as, &words)?;
        if matches!(one.stage, Stage::Done) && !self.refuses {
            match self.record(pass, &one, &attention) {
                Ok(recorded) => {
                    one.stage = Stage::Recorded(Box::new(recorded));
                    self.counts.recordings += 1;
                }
                Err(error) => {
                    eprintln!("the layers' work could not be recorded as a graph, and is asked for anew each time: {error}");
                    self.refuses = true;
                }
            }
        }
        let number = self.counts.passes;
        let embed = |to: &Input| pass.embedding.forward(&self.machine, &pass.common, to);
        let (result, embedded, asked) = match &one.stage {
            Stage::Recorded(recorded) => {
                let embedded = embed(&recorded.input)?;
                self.machine.replay(&recorded.forward)?;
                self.counts.replayed += 1;
                (self.read(&recorded.result, pass)?, embedded, None)
            }
            _ => {
                let input = self.empty(&one)?;
                let embedded = embed(&input.input())?;
                let (result, asked) = self.ask_forward(pass, &one, attention, input)?;
                (self.read(&result.input(), pass)?, embedded, Some(asked))
            }
        };
        self.uses.push(one);
        self.counts.passes += 1;
        (pass.number, self.last) = (number, Some(Last { number, embedded, asked }));
        Ok(result)
    }

    /// See [`super::Runs::backward`].
    pub fn backward(
        &mut self,
        pass: &mut Forward,
        gradient: &Tensor,
        complete: &mut dyn FnMut(usize, Gradients) -> Result<()>,
    ) -> Result<Option<ByEmbedding>> {
        if self.last.as_ref().is_none_or(|last| last.number != pass.number) {
            self.forward(pass)?;
        }
        // From now on, memory of its results is written to.
        let (Some(last), Some(mut one)) = (self.last.take(), self.uses.pop()) else { candle_core::bail!("{NAME}: no pass") };
        let embedded = last.embedded;
        let by_embedding = match (&one.stage, last.asked) {
            (Stage::Recorded(recorded), None) => self.replay_backward(pass, recorded, embedded, gradient, complete),
            (_, Some(asked)) => self.ask_backward(pass, &one, asked, embedded, gradient, complete),
            _ => candle_core::bail!("{NAME}: a pass has left nothing"),
        };
        if matches!(one.stage, Stage::First) && by_embedding.is_ok() {
            one.stage = Stage::Done;
        }
        self.uses.push(one);
        by_embedding
    }

    /// Where a pass has more rows than any before, begins with new memory: pieces for fewer rows are of no use to it, and those for it are
    /// large enough for all others. What was recorded is recorded again there.
    fn make_room(&mut self, rows: usize) {
        if rows <= self.most_rows {
            return;
        }
        self.most_rows = rows;
        self.memory = Reserved::of(&self.machine);
        for one in &mut self.uses {
            if matches!(one.stage, Stage::Recorded(_)) {
                one.stage = Stage::Done;
            }
        }
    }

    /// What a pass is used as, its attention, and the words that this is told: tables and seeds.
    fn told(&self, pass: &Forward) -> Result<(Use, Attention, Vec<u32>)> {
        let Forward { embedding, layers, common, .. } = pass;
        let hidden = embedding.hidden();
        let rows = filled(embedding.rows(), 128).next_multiple_of(16);
        let sizes = (common.heads, hidden / common.heads);
        let (attention, tables) =
            Attention::of_plan(&common.plan, rows, sizes, 1.0 - common.rate, Element::of(common.precision))?;
        let weights = layers.iter().flat_map(|given| &given.weights);
        let weights = weights.map(|weight| Ok((self.machine.place(NAME, weight)?.at, weight.track_op())));
        let used_as = Use {
            shape: (rows, hidden),
            lengths: tables.lengths(),
            heads: common.heads,
            eps: common.eps,
            rate: common.rate,
            precision: common.precision,
            first_kept: common.first_kept,
            checkpointing: common.checkpointing,
            input_wanted: pass.input_wanted(),
            weights: weights.collect::<Result<_>>()?,
        };
        let words = tables.words(layers.iter().flat_map(|given| given.seeds));
        Ok((used_as, attention, words))
    }

    /// The use that is this one, or a new one, with the words where they are read.
    fn take_out(&mut self, used_as: Use, words: &[u32]) -> Result<OneUse<M>> {
        /// Packed batches have a few shapes, filled up as they are. A recording is small: memory is all the uses' together.
        const KEPT: usize = 32;
        if let Some(place) = self.uses.iter().position(|one| one.used_as == used_as) {
            let mut one = self.uses.remove(place);
            self.machine.overwrite(&mut one.words, words)?;
            return Ok(one);
        }
        if self.uses.len() == KEPT {
            self.uses.remove(0);
        }
        Ok(OneUse { used_as, words: self.machine.upload(words)?, stage: Stage::First })
    }

    fn placed(&self, one: &OneUse<M>) -> Placed {
        Placed::at(self.machine.words_at(&one.words), one.used_as.lengths)
    }

    fn stack<'a>(
        &'a self,
        pass: &'a Forward,
        one: &OneUse<M>,
        attention: &'a Attention,
        laid: &'a Laid<M>,
    ) -> Stack<'a, Reserved<M>> {
        Stack {
            machine: &self.memory,
            common: &pass.common,
            layers: &pass.layers,
            attention,
            matrices: &laid.matrices,
            placed: self.placed(one),
            pieces: laid.pieces.as_ref().map_or(Address::NULL, |words| self.machine.words_at(words)),
        }
    }

    fn laid(&self, pass: &Forward, one: &OneUse<M>) -> Result<Laid<M>> {
        let matrices = Matrices::of(&self.memory, &pass.layers, one.used_as.element())?;
        let pieces = matrices.pieces().map(|pieces| self.machine.upload(pieces)).transpose()?;
        Ok(Laid { matrices, pieces })
    }

    /// Memory for rows, with nothing in particular in it.
    fn empty(&self, one: &OneUse<M>) -> Result<Array<Reserved<M>>> {
        Array::empty(&self.memory, one.used_as.shape, one.used_as.element())
    }

    fn ask_forward(
        &self,
        pass: &Forward,
        one: &OneUse<M>,
        attention: Attention,
        input: Array<Reserved<M>>,
    ) -> Result<(Array<Reserved<M>>, Asked<M>)> {
        let laid = self.laid(pass, one)?;
        let (result, left) = self.stack(pass, one, &attention, &laid).forward(input)?;
        Ok((result, Asked { attention, laid, left }))
    }

    fn ask_backward(
        &self,
        pass: &Forward,
        one: &OneUse<M>,
        asked: Asked<M>,
        embedded: Embedded<M>,
        gradient: &Tensor,
        complete: &mut dyn FnMut(usize, Gradients) -> Result<()>,
    ) -> Result<Option<ByEmbedding>> {
        let Asked { attention, laid, left } = asked;
        let stack = self.stack(pass, one, &attention, &laid);
        let mut by = self.empty(one)?;
        self.store(gradient, &by.input())?;
        for of_layer in left.into_iter().rev() {
            let (number, wanted) = (of_layer.number, goes_on(pass, of_layer.number));
            let (by_input, by_weights) = stack.backward(of_layer, by, wanted)?;
            let (numbers, gathering) = self.gathering(&by_weights)?;
            complete(number, self.gathered(pass, number, &numbers, &gathering)?)?;
            drop(by_weights);
            let Some(by_input) = by_input else { return Ok(None) };
            by = by_input;
        }
        pass.embedding.backward(&self.machine, &pass.common, embedded, &by.input()).map(Some)
    }

    fn replay_backward(
        &self,
        pass: &Forward,
        recorded: &Recorded<M>,
        embedded: Embedded<M>,
        gradient: &Tensor,
        complete: &mut dyn FnMut(usize, Gradients) -> Result<()>,
    ) -> Result<Option<ByEmbedding>> {
        self.store(gradient, &recorded.by_result)?;
        for RecordedLayer { number, backward, numbers, gathering } in &recorded.backward {
            self.machine.replay(backward)?;
            complete(*number, self.gathered(pass, *number, numbers, gathering)?)?;
        }
        let Some(by_input) = &recorded.by_input else { return Ok(None) };
        pass.embedding.backward(&self.machine, &pass.common, embedded, by_input).map(Some)
    }

    /// Records a pass both ways. All memory is given back then: nobody else writes to it while the recordings are done.
    fn record(&self, pass: &Forward, one: &OneUse<M>, attention: &Attention) -> Result<Recorded<M>> {
        let given = self.empty(one)?;
        let input = given.input();
        let laid = self.laid(pass, one)?;
        let stack = self.stack(pass, one, attention, &laid);
        let ((y, left), forward) = self.machine.record(|| stack.forward(given))?;
        // The result is read before the gradient by it is written.
        let result = y.input();
        drop(y);
        let mut by = Some(self.empty(one)?);
        let by_result = by.as_ref().map(Array::input);
        let mut backward = Vec::new();
        for of_layer in left.into_iter().rev() {
            let (number, wanted) = (of_layer.number, goes_on(pass, of_layer.number));
            let Some(gradient) = by.take() else { candle_core::bail!("{NAME}: a layer without a gradient") };
            let ((by_input, by_weights), recording) = self.machine.record(|| stack.backward(of_layer, gradient, wanted))?;
            let (numbers, gathering) = self.gathering(&by_weights)?;
            backward.push(RecordedLayer { number, backward: recording, numbers, gathering });
            by = by_input;
        }
        let Some(by_result) = by_result else { candle_core::bail!("{NAME}: no gradient") };
        let by_input = by.as_ref().map(Array::input);
        Ok(Recorded { input, result, by_result, by_input, forward, backward, _pieces: laid.pieces })
    }

    fn gathering(&self, by_weights: &ByWeights<Reserved<M>>) -> Result<(Vec<usize>, Gathering<M>)> {
        let numbers = by_weights.places.iter().map(|&(number, ..)| number).collect();
        let places: Vec<_> = by_weights.places.iter().map(|&(_, at, count)| (at, count)).collect();
        Ok((numbers, Gathering::of(&self.machine, &places)?))
    }

    fn gathered(&self, pass: &Forward, layer: usize, numbers: &[usize], gathering: &Gathering<M>) -> Result<Gradients> {
        let weights = &pass.layers[layer].weights;
        let found = gathering.gathered(&self.machine, numbers.iter().map(|&number| weights[number].shape()))?;
        let mut all: Gradients = [const { None }; WEIGHTS.len()];
        for (&number, gradient) in numbers.iter().zip(found) {
            all[number] = Some(gradient);
        }
        Ok(all)
    }

    /// Stores a contiguous f32 tensor as the first rows of an array, whose other rows become zeros.
    fn store(&self, tensor: &Tensor, to: &Input) -> Result<()> {
        let from = self.machine.place(NAME, tensor)?;
        match to.element {
            Element::F32 => copy(&self.machine, from.at, to.at, from.count())?,
            Element::Bf16 => round_to(&self.machine, from.at, to.at, from.count())?,
        }
        let ((rows, width), (stored, _)) = (to.matrix(), from.matrix());
        if stored == rows {
            return Ok(());
        }
        let behind = to.element.after(to.at, stored * width);
        fill_rows(&self.machine, Address::NULL, behind, to.element, rows - stored, width)
    }

    /// As many of an array's first rows as the pass has, in f32.
    fn read(&self, from: &Input, pass: &Forward) -> Result<Tensor> {
        let shape = Shape::from((pass.embedding.rows(), pass.embedding.hidden()));
        let values = self.machine.allocate(shape.elem_count())?;
        let to = self.machine.at(&values);
        match from.element {
            Element::F32 => copy(&self.machine, from.at, to, shape.elem_count())?,
            Element::Bf16 => widen_to(&self.machine, from.at, to, shape.elem_count())?,
        }
        self.machine.tensor(values, &shape)
    }
}

/// Whether a gradient by a layer's input leads anywhere.
fn goes_on(pass: &Forward, layer: usize) -> bool {
    layer > pass.common.first_kept || pass.input_wanted()
}
