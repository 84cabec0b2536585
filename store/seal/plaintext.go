package seal

import (
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
)

// Redacted is what a Plaintext prints as.
const Redacted = "[redacted]"

// Plaintext is a secret's value in memory. It prints as [Redacted] in every fmt
// verb, in JSON, as text and in slog; only Bytes and Reveal give the value
// away. The zero value is an empty value. It is immutable, so copies may share
// it between goroutines.
type Plaintext struct {
	// A function, because fmt and other printers look into unexported fields by
	// reflection, where they can't ask for methods: no reflection sees what a
	// function holds.
	reveal func() []byte
}

// New returns a Plaintext with a copy of b.
func New(b []byte) Plaintext {
	b = slices.Clone(b)
	return Plaintext{reveal: func() []byte { return b }}
}

// Bytes returns the value itself. The caller must not change it.
func (p Plaintext) Bytes() []byte {
	if p.reveal == nil {
		return nil
	}
	return p.reveal()
}

// Reveal returns the value as a string.
func (p Plaintext) Reveal() string { return string(p.Bytes()) }

// Len returns the value's length in bytes.
func (p Plaintext) Len() int { return len(p.Bytes()) }

// Equal reports, in a time that depends on the lengths only, whether both
// values are the same.
func (p Plaintext) Equal(other Plaintext) bool {
	return subtle.ConstantTimeCompare(p.Bytes(), other.Bytes()) == 1
}

// Format prints [Redacted], whatever the verb.
func (Plaintext) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, Redacted) }

// String returns [Redacted].
func (Plaintext) String() string { return Redacted }

// GoString returns [Redacted].
func (Plaintext) GoString() string { return Redacted }

// LogValue returns [Redacted].
func (Plaintext) LogValue() slog.Value { return slog.StringValue(Redacted) }

// MarshalJSON returns [Redacted] as a JSON string.
func (Plaintext) MarshalJSON() ([]byte, error) { return []byte(`"` + Redacted + `"`), nil }

// MarshalText returns [Redacted].
func (Plaintext) MarshalText() ([]byte, error) { return []byte(Redacted), nil }

var errEncode = errors.New("seal: a plaintext can't be encoded")

// MarshalBinary fails: encodings meant to be read back must not lose the value
// silently.
func (Plaintext) MarshalBinary() ([]byte, error) { return nil, errEncode }

// GobEncode fails, like MarshalBinary.
func (Plaintext) GobEncode() ([]byte, error) { return nil, errEncode }
