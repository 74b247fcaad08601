import pytest

from vovnet.profiling.liveness import Peak, Step, peak_live

SIZES = {0: 10, 1: 20, 2: 5, 3: 1}


def peak(*steps: tuple[int, ...], outputs: tuple[int, ...] = (3,)) -> Peak:
    named = [Step(f"step {index}", buffers) for index, buffers in enumerate(steps)]
    return peak_live(named, SIZES, inputs=[0], outputs=outputs)


def test_a_chain_holds_two_neighbours() -> None:
    assert peak((0, 1), (1, 2), (2, 3)) == Peak(30, "step 0")


def test_a_skipping_connection_keeps_its_source() -> None:
    assert peak((0, 1), (1, 2), (0, 2, 3)) == Peak(35, "step 1")


def test_an_output_lives_to_the_end() -> None:
    assert peak((0, 2), (2, 1), (1, 3), outputs=(2, 3)) == Peak(26, "step 2")
    assert peak((0, 2), (2, 1), (1, 3)) == Peak(25, "step 1")


def test_work_in_place_needs_no_second_buffer() -> None:
    assert peak((0,), (0, 2), outputs=(2,)) == Peak(15, "step 1")


def test_an_unused_input_is_gone_after_the_first_step() -> None:
    steps = [Step("a", (1,)), Step("b", (1, 2))]
    assert peak_live(steps, SIZES, inputs=[0], outputs=[2]) == Peak(30, "a")


@pytest.mark.parametrize(("outputs", "elements"), [((0,), 10), ((0, 1), 30)])
def test_without_operations_inputs_and_outputs_remain(
    outputs: tuple[int, ...], elements: int
) -> None:
    assert peak(outputs=outputs) == Peak(elements, "")
