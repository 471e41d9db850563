"""`petals chat`: a conversation in the terminal. Knows the client's public names only."""

import sys
from dataclasses import dataclass, field
from typing import Annotated

import typer

from petals import constants
from petals.cli.terminal import options
from petals.cli.terminal.answer import ChatReply, WordStream, ask, describe
from petals.cli.terminal.chat_template import ChatTemplate
from petals.cli.terminal.client_model import ClientModel, load_client
from petals.cli.terminal.console import EXIT_FAILED, report, say
from petals.cli.terminal.conversation import COMMAND_NAMES, ChatTurns, react
from petals.cli.terminal.lifetime import Interrupts
from petals.cli.terminal.line_input import LineSource, open_lines
from petals.cli.terminal.wording import utf8
from petals.client.config import ClientConfig
from petals.errors import BadInput, LengthExceeded, PetalsError

_GREETING = "Type a question. /help lists the commands, Ctrl-C ends an answer, Ctrl-D the chat."
_HISTORY_FILE = "chat-history"


@options.with_config(ClientConfig, heading="Swarm")
def chat(
    config: ClientConfig,
    model: options.ModelArgument,
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: Annotated[
        float,
        typer.Option(min=0.0, metavar="T", help="0 takes the most probable token every time."),
    ] = 0.0,
    system: Annotated[
        str, typer.Option(metavar="TEXT", help="System prompt: the role of the model.")
    ] = "",
    chat_template: options.ChatTemplateName = "",
) -> None:
    """Talk with a model that a swarm serves.

    Reads questions from a pipe, too: one a line; the exit status is 1 if one of them failed.
    """
    opening = utf8(system, "The system prompt")
    with load_client(model, config) as client:
        run = _Chat(
            client=client,
            template=ChatTemplate(client.tokenizer, say, chat_template),
            conversation=ChatTurns(system=opening),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
        )
        lines = open_lines(constants.cache_dir() / _HISTORY_FILE, COMMAND_NAMES)
        if lines.is_terminal:
            say(_GREETING)
        num_failed = run.talk(lines)
    if num_failed and not lines.is_terminal:
        raise typer.Exit(EXIT_FAILED)


@dataclass(slots=True, kw_only=True)
class _Chat:
    client: ClientModel
    template: ChatTemplate
    conversation: ChatTurns
    max_new_tokens: int
    temperature: float
    _interrupts: Interrupts = field(default_factory=Interrupts)

    def talk(self, lines: LineSource) -> int:
        """Answer until the end of input or /quit; return how many lines failed.

        Ctrl-C at the prompt drops the line; a second one in a row raises KeyboardInterrupt.
        """
        num_failed, is_leaving = 0, False
        while True:
            try:
                line = lines.read()
            except BadInput as error:
                report(error)
                num_failed += 1
                continue
            except KeyboardInterrupt:
                if is_leaving or not lines.is_terminal:
                    raise
                say("Ctrl-C once more, Ctrl-D or /quit leaves.")
                is_leaving = True
                continue
            is_leaving = False
            if line is None:
                return num_failed
            effect = react(line, self.conversation)
            if effect.leaves:
                return num_failed
            if effect.words:
                say(effect.words)
            num_failed += effect.refused
            if effect.question:
                num_failed += not self._answer(effect.question, lines.is_terminal)

    def _answer(self, question: str, may_interrupt: bool) -> bool:
        """Stream the answer and keep it. False if the question failed: then it is reported and not
        kept.

        The first Ctrl-C at a terminal ends the answer, and what was shown of it is kept, so that
        the conversation is what the user sees. Later ones raise KeyboardInterrupt.
        """
        stream = WordStream(self.client.tokenizer, _show)
        try:
            with self._interrupts.counted():
                answer = self._ask(question, stream)
        except KeyboardInterrupt:
            if not may_interrupt or self._interrupts.pressed > 1:
                raise
            _show("\n")
            if stream.text:
                self.conversation.add(question, stream.text)
            say(
                f"Stopped{', the answer so far is kept' if stream.text else ''}. /retry asks again."
            )
            return True
        except PetalsError as error:
            if stream.text:
                _show("\n")
            report(error)
            if isinstance(error, LengthExceeded):
                say("/clear forgets the conversation, which makes room.")
            return False
        _show("\n")
        say(describe(answer))
        self.conversation.add(question, answer.text)
        return True

    def _ask(self, question: str, stream: WordStream) -> ChatReply:
        return ask(
            self.client.model,
            self.template.encode(self.conversation.messages(question)),
            stream,
            max_new_tokens=self.max_new_tokens,
            **self.client.sampling(self.temperature, seed=None),
        )


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
