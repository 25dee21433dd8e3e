"""What all answers have in common, whatever they answer."""


def answer_text(response):
    """What stands behind the thought, and inside the <answer> tags if there are any.

    >>> answer_text("2 + 2</think> It is <answer> 4 </answer>")
    '4'
    """
    text = response.rpartition("</think>")[2]
    return (text.rpartition("<answer>")[2].partition("</answer>")[0] if "<answer>" in text else text).strip()
