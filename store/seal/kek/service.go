package kek

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"time"

	"github.com/workspaced/workspaced/store/seal"
)

// callTimeout bounds one call of a key service.
const callTimeout = 5 * time.Second

// asker asks a key service. Its errors are failures, seal.ErrOpen, or the
// context's.
type asker interface {
	encrypt(ctx context.Context, plain, associated []byte) ([]byte, error)
	decrypt(ctx context.Context, wrapped, associated []byte) ([]byte, error)
}

// service is a KEK that a key service keeps.
type service struct {
	name    string
	life    context.Context // its end ends calls
	timeout time.Duration   // of a call
	ask     asker
}

var _ seal.KEK = (*service)(nil)

func newService(life context.Context, name string, ask asker) *service {
	return &service{name: name, life: life, timeout: callTimeout, ask: ask}
}

// Name implements seal.KEK.
func (s *service) Name() string { return s.name }

// EncryptWithContext implements seal.KEK. What was wrapped is unwrapped again before
// it is relied on: who may encrypt, but not decrypt, would learn of it at the next
// start, when no secret can be opened any more.
func (s *service) EncryptWithContext(ctx context.Context, plain, associated []byte) ([]byte, error) {
	wrapped, err := s.call(ctx, s.ask.encrypt, plain, associated)
	if err != nil {
		return nil, err
	}
	switch again, err := s.call(ctx, s.ask.decrypt, wrapped, associated); {
	case errors.Is(err, seal.ErrOpen), err == nil && !bytes.Equal(again, plain):
		return nil, fail(ErrUnavailable, "it does not unwrap what it has just wrapped")
	case err != nil:
		return nil, err
	}
	// Nor on one that leaves the associated data out, as Vault before 1.13 does: it
	// would unwrap it for another database as well.
	other := append(slices.Clone(associated), "another's"...)
	switch _, err := s.call(ctx, s.ask.decrypt, wrapped, other); {
	case err == nil:
		return nil, fail(ErrRefused, "it does not bind what it wraps to the database: it leaves associated data out")
	case !errors.Is(err, seal.ErrOpen):
		return nil, err
	}
	return wrapped, nil
}

// DecryptWithContext implements seal.KEK.
func (s *service) DecryptWithContext(ctx context.Context, wrapped, associated []byte) ([]byte, error) {
	if len(wrapped) == 0 {
		return nil, seal.ErrOpen
	}
	return s.call(ctx, s.ask.decrypt, wrapped, associated)
}

// Format keeps what proves who we are out of what prints a KEK.
func (s *service) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "kek of "+s.name) }

func (s *service) call(ctx context.Context, do func(context.Context, []byte, []byte) ([]byte, error), in, associated []byte) ([]byte, error) {
	calling, cancel := context.WithTimeout(ctx, s.timeout)
	defer cancel()
	defer context.AfterFunc(s.life, cancel)()
	out, err := do(calling, in, associated)
	switch {
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case s.life.Err() != nil:
		return nil, s.life.Err()
	case err != nil && calling.Err() != nil:
		return nil, fail(ErrUnavailable, "no useful answer within %v", s.timeout)
	case err != nil:
		return nil, err
	case len(out) == 0:
		return nil, errGarbage
	}
	return out, nil
}

// errGarbage is for an answer that is none of this kind of key service.
var errGarbage = fail(ErrUnavailable, "the answer is not that of a key service of this kind")

// refuseRedirect is for http.Client. Redirects keep the body, which has data keys in
// it, and most headers, and may name any host.
func refuseRedirect(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }

// redirected is for the answer that comes of that.
func redirected(status int) error {
	return fail(ErrRefused, "it answers with a redirect (HTTP %d), which could send the key elsewhere: name the right address", status)
}

func isRedirect(status int) bool { return status >= 300 && status < 400 }

// noAnswer says why a service could not be reached, in the words of this machine
// alone.
func noAnswer(err error) error {
	if certificate := new(tls.CertificateVerificationError); errors.As(err, &certificate) {
		return fail(ErrUnavailable, "its certificate can't be verified: %v", certificate.Err)
	}
	if network := new(net.OpError); errors.As(err, &network) {
		return fail(ErrUnavailable, "can't be reached: %v", network)
	}
	return fail(ErrUnavailable, "no answer that can be understood")
}
