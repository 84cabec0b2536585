package access

import (
	"context"
	"errors"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/metadata"
)

// Authenticator tells who makes a call, and ends calls whose caller's credentials
// have ended. The zero value knows no tokens.
type Authenticator struct {
	// Tokens are those that calls may carry; nil: none is valid.
	Tokens *Tokens

	mu    sync.Mutex
	calls map[*heldCall]struct{}
}

// heldCall is a call that lasts, and ends with its caller's credentials.
type heldCall struct {
	id  *Identity
	end context.CancelCauseFunc
}

// Identify looks at a call's credentials. Those of the connection count, unless the
// call carries a token: then that alone does, and one that is not valid makes the
// caller nobody, whatever the connection says. On the containers' socket only a
// container's token counts, and that nowhere else.
func (a *Authenticator) Identify(ctx context.Context) *Identity {
	c := containerOf(ctx)
	token, sent, err := bearer(ctx)
	switch {
	case err != nil:
		return &Identity{Err: err}
	case c != nil:
		return c.containers.identify(ctx, token)
	case sent:
		return a.Tokens.identify(token)
	default:
		return connection(ctx)
	}
}

// bearer is the token that the call carries, if it carries one.
func bearer(ctx context.Context) (token string, sent bool, _ *UnauthenticatedError) {
	switch values := metadata.ValueFromIncomingContext(ctx, "authorization"); len(values) {
	case 0:
		return "", false, nil
	case 1:
		scheme, token, _ := strings.Cut(values[0], " ")
		if !strings.EqualFold(scheme, "bearer") {
			return "", true, &UnauthenticatedError{Token: true, Why: "the authorization is no bearer token"}
		}
		return token, true, nil
	default:
		return "", true, &UnauthenticatedError{Token: true, Why: "more than one authorization"}
	}
}

// Hold is ctx for a call that lasts: it ends when the caller's token or certificate
// ends, is revoked or no longer trusted, with an *UnauthenticatedError as its cause.
// The caller of Hold calls release when the call is over.
func (a *Authenticator) Hold(ctx context.Context, id *Identity) (held context.Context, release func()) {
	if id.valid == nil {
		return ctx, func() {}
	}
	held, end := context.WithCancelCause(ctx)
	call := &heldCall{id, end}
	a.mu.Lock()
	if a.calls == nil {
		a.calls = make(map[*heldCall]struct{})
	}
	a.calls[call] = struct{}{}
	a.mu.Unlock()
	call.recheck() // it may have been revoked before anybody knew of the call
	var expiry *time.Timer
	if !id.Subject.Expires.IsZero() {
		// A moment later, so that it has ended by whichever clock.
		expiry = time.AfterFunc(time.Until(id.Subject.Expires)+time.Millisecond, call.recheck)
	}
	return held, func() {
		if expiry != nil {
			expiry.Stop()
		}
		a.mu.Lock()
		delete(a.calls, call)
		a.mu.Unlock()
		end(nil)
	}
}

// recheck ends the call if its caller's credentials no longer hold.
func (c *heldCall) recheck() {
	if err := c.id.check(); err != nil {
		c.end(err)
	}
}

// Recheck ends the calls whose callers' credentials no longer hold. It is called
// when a token was revoked, or the authorities of certificates have changed.
func (a *Authenticator) Recheck() {
	a.mu.Lock()
	defer a.mu.Unlock()
	for call := range a.calls {
		call.recheck()
	}
}

// TendInterval is how often Tend is to be called.
const TendInterval = time.Minute

// Tend is called now and then. It writes when tokens were used last, and ends the
// calls of those that have expired by a clock that was set.
func (a *Authenticator) Tend(ctx context.Context) error {
	a.Recheck()
	return a.Tokens.Flush(ctx)
}

// Ended is the error of a call that was ended because its caller's credentials
// were; nil: it was not.
func Ended(ctx context.Context) error {
	var ended *UnauthenticatedError
	if ctx.Err() != nil && errors.As(context.Cause(ctx), &ended) {
		return ended
	}
	return nil
}
