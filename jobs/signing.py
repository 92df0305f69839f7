"""Keys, and signatures of generations: `ddpm keys create FILE`, `ddpm sign PREFIX`."""

from pathlib import Path

from ddpm_pipeline.errors import UserError
from ddpm_pipeline.jobs.progress_bar import progress_of
from ddpm_pipeline.jobs.runner import DONE, FAILED, use_running_stack
from ddpm_pipeline.signatures import KEY_FILE_VARIABLE, KEY_VARIABLE, PublicKey, SigningKey
from ddpm_pipeline.telemetry.terminal import echo, echo_json


def create(file: Path) -> int:
    """Write a new key pair and say how it is used."""
    made = SigningKey.create(file)
    echo(f"private  {file}, mode 0600: whoever has it signs as you")
    echo(f"public   {file}.pub")
    echo(*_lines(made.public))
    echo(f"next     export {KEY_FILE_VARIABLE}={file.absolute()}   (jobs then sign what they publish)")
    return DONE


def show(file: Path | None, as_json: bool = False) -> int:
    """Print the public part of a key: of a file, private or public, or of this environment."""
    public = _public(file)
    if as_json:
        echo_json({"key_id": public.key_id, "public": public.text})
    else:
        echo(*_lines(public))
        echo(f"next     ddpm verify PREFIX --key {public.text}")
    return DONE


def sign(prefix: str) -> int:
    """Verify a complete generation, then sign it with the key of this environment."""
    from ddpm_pipeline.generate.prefix_spec import open_generation
    from ddpm_pipeline.generate.signed_manifest import sign_stored
    from ddpm_pipeline.generate.verification import verify
    from ddpm_pipeline.jobs.verify import lines

    signer = SigningKey.configured()
    if signer is None:
        raise UserError(f"{KEY_FILE_VARIABLE}: not set; it names the private key, see ddpm keys create")
    use_running_stack()
    with progress_of("verify", "shards") as progress:
        report = verify(prefix, progress)
    if not report.ok:
        echo(*lines(report))
        return FAILED
    sign_stored(open_generation(prefix), signer)
    echo(f"signed   {prefix} by key {signer.public.key_id}")
    echo(f"next     ddpm verify {prefix} --key {signer.public.text}")
    return DONE


def _lines(public: PublicKey) -> list[str]:
    return [f"key id   {public.key_id}", f"line     {public.text}"]


def _public(file: Path | None) -> PublicKey:
    if file is None:
        signer = SigningKey.configured()
        if signer is None:
            raise UserError(f"{KEY_FILE_VARIABLE}: not set, nor {KEY_VARIABLE}; name the key's file")
        return signer.public
    try:
        is_private = b"PRIVATE KEY" in file.read_bytes()[:100]
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; name the file of a key") from None
    return SigningKey.from_file(file).public if is_private else PublicKey.read(str(file))
