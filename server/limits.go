package server

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path"
	"sync"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/workspaced/workspaced/server/access"
)

// Limits bound what one caller can take of the server. The zero value has none. A
// caller is a subject, with all its connections; those who are nobody are one an
// address, or one all together if they come from nowhere, as by a unix socket.
type Limits struct {
	// Rate is how many calls a second a caller makes in the long run; it can make as
	// many as in two seconds at once.
	Rate int
	// MethodRates are the same for single RPCs, by their last name: SetSecret.
	MethodRates map[string]int
	// NobodyRate is Rate for those who are nobody.
	NobodyRate int
	// Calls is how many calls of a caller are in flight at once, streams included.
	Calls int
	// Streams is how many of them are streams, which are there for long.
	Streams int
}

const (
	// nobodyCalls is Limits.Calls for those who are nobody, if there is a limit.
	nobodyCalls = 64
	// maxCallers is how many callers are told apart at the same time, of those with a
	// name and of those who are nobody. Those that come while there are so many share
	// one place.
	maxCallers = 10_000
	// callerIdle is after how long without a call a caller is forgotten. Its rates
	// have recovered long before.
	callerIdle = 10 * time.Second
	// sweepPause is how much time is between two searches for those.
	sweepPause = time.Second
	// retryAfterCrowd is when a caller with too many calls in flight may try again.
	retryAfterCrowd = time.Second
)

// limiter holds callers to the limits. What it keeps of them is bounded.
type limiter struct {
	limits Limits

	mu      sync.Mutex
	callers map[callerKey]*caller
	nobody  int // of them have no name
	swept   time.Time
	refused map[string]uint64 // by reason
}

// callerKey is a subject's name, or of nobody the address.
type callerKey struct{ subject, address string }

// The places that callers share when there are too many: those with a name, and those
// who are nobody, whom it costs nothing to be many.
var (
	everybodyElse = callerKey{subject: "*"}
	nobodyElse    = callerKey{address: "*"}
)

type caller struct {
	rate           *rate.Limiter
	methods        map[string]*rate.Limiter // of those in Limits.MethodRates it has called
	calls, streams int                      // in flight
	last           time.Time
}

func newLimiter(limits Limits) *limiter {
	return &limiter{limits: limits, callers: make(map[callerKey]*caller), refused: make(map[string]uint64)}
}

// place is what a call in flight takes.
type place struct {
	caller *caller
	stream bool
}

// enter lets a call in, until leave, or says why not.
func (l *limiter) enter(ctx context.Context, method string, stream bool) (place, error) {
	if access.SubjectOf(ctx).Instance != nil {
		return place{}, nil // a container has bounds of its own: see access.Containers
	}
	key := callerOf(ctx)
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	c := l.find(key, now)
	c.last = now
	calls := l.limits.Calls
	if key.subject == "" && calls > 0 {
		calls = min(calls, nobodyCalls)
	}
	switch {
	case calls > 0 && c.calls >= calls:
		return place{}, l.refuse(key, ReasonTooManyCalls, retryAfterCrowd, fmt.Sprintf("at most %d calls at the same time", calls))
	case stream && l.limits.Streams > 0 && c.streams >= l.limits.Streams:
		return place{}, l.refuse(key, ReasonTooManyStreams, retryAfterCrowd, fmt.Sprintf("at most %d streams at the same time", l.limits.Streams))
	}
	name := path.Base(method)
	if r := l.limits.MethodRates[name]; r > 0 {
		if c.methods[name] == nil {
			if c.methods == nil {
				c.methods = make(map[string]*rate.Limiter)
			}
			c.methods[name] = newRate(r)
		}
		if wait := take(c.methods[name], now); wait > 0 {
			return place{}, l.refuse(key, ReasonRateLimited, wait, fmt.Sprintf("at most %d calls of %s a second", r, name))
		}
	}
	if c.rate != nil {
		if wait := take(c.rate, now); wait > 0 {
			return place{}, l.refuse(key, ReasonRateLimited, wait, fmt.Sprintf("at most %v calls a second", c.rate.Limit()))
		}
	}
	c.calls++
	if stream {
		c.streams++
	}
	return place{c, stream}, nil
}

// leave gives the place of a call that has ended to others.
func (l *limiter) leave(p place) {
	if p.caller == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	p.caller.calls--
	if p.stream {
		p.caller.streams--
	}
}

// find returns the caller, a new one if it has to be.
func (l *limiter) find(key callerKey, now time.Time) *caller {
	if c := l.callers[key]; c != nil {
		return c
	}
	nobody := key.subject == ""
	if l.full(key) && now.Sub(l.swept) >= sweepPause {
		l.swept = now
		for key, c := range l.callers {
			if c.calls == 0 && now.Sub(c.last) >= callerIdle {
				delete(l.callers, key)
				if key.subject == "" {
					l.nobody--
				}
			}
		}
	}
	if l.full(key) {
		key = everybodyElse
		if nobody {
			key = nobodyElse
		}
		if c := l.callers[key]; c != nil {
			return c
		}
	}
	if nobody {
		l.nobody++
	}
	c := &caller{}
	switch {
	case key.subject == "" && l.limits.NobodyRate > 0:
		c.rate = newRate(l.limits.NobodyRate)
	case key.subject != "" && l.limits.Rate > 0:
		c.rate = newRate(l.limits.Rate)
	}
	l.callers[key] = c
	return c
}

// full reports whether no more callers like that one are told apart.
func (l *limiter) full(key callerKey) bool {
	n := l.nobody
	if key.subject != "" {
		n = len(l.callers) - l.nobody
	}
	return n >= maxCallers
}

func newRate(perSecond int) *rate.Limiter { return rate.NewLimiter(rate.Limit(perSecond), 2*perSecond) }

// take takes a call's worth, or says how long until there is one.
func take(r *rate.Limiter, now time.Time) (wait time.Duration) {
	reserved := r.ReserveN(now, 1)
	if wait = reserved.DelayFrom(now); wait > 0 {
		reserved.CancelAt(now)
	}
	return wait
}

// refuse makes the error of a call that is not let in.
func (l *limiter) refuse(key callerKey, reason string, after time.Duration, limit string) error {
	l.refused[reason]++
	subject := key.subject
	if subject == "" {
		subject = "callers without credentials"
	}
	return &apiError{
		code:     codes.ResourceExhausted,
		reason:   reason,
		message:  fmt.Sprintf("%s: %s", shorten(subject, maxFieldBytes), limit),
		metadata: map[string]string{"subject": shorten(subject, maxFieldBytes)},
		details: []protoadapt.MessageV1{
			&errdetails.QuotaFailure{Violations: []*errdetails.QuotaFailure_Violation{{Subject: shorten(subject, maxFieldBytes), Description: limit}}},
			retryInfo(after),
		},
	}
}

// callerOf is whose call it is.
func callerOf(ctx context.Context) callerKey {
	if subject := access.SubjectOf(ctx).Name; subject != "" {
		return callerKey{subject: subject}
	}
	p, ok := peer.FromContext(ctx)
	if !ok || p.Addr == nil {
		return callerKey{}
	}
	return callerKey{address: network(p.Addr)}
}

// network is what counts as one address: of IPv6 a subscriber's 64 bits.
func network(addr net.Addr) string {
	ap, err := netip.ParseAddrPort(addr.String())
	if err != nil {
		return addr.Network()
	}
	ip := ap.Addr().Unmap().WithZone("")
	if ip.Is6() {
		if prefix, err := ip.Prefix(64); err == nil {
			return prefix.String()
		}
	}
	return ip.String()
}

// LimitRefusals counts the calls that were refused, by the reason in their
// ErrorInfo.
func (s *Server) LimitRefusals() map[string]uint64 {
	s.limits.mu.Lock()
	defer s.limits.mu.Unlock()
	counts := make(map[string]uint64)
	for _, reason := range []string{ReasonRateLimited, ReasonTooManyCalls, ReasonTooManyStreams} {
		counts[reason] = s.limits.refused[reason]
	}
	return counts
}

// HasMethod reports whether one of our services has an RPC of that last name.
func HasMethod(name string) bool {
	for _, service := range services() {
		if service.Methods().ByName(protoreflect.Name(name)) != nil {
			return true
		}
	}
	return false
}

// errNoRequest: a handler was called without a request. It never is: what can't
// have one is refused before.
var errNoRequest = errors.New("server: no request")

// arrive is what a unary call meets before its request is read: who calls, and the
// limits. Whoever is nobody and may not call has sent in vain what he has sent.
func (s *Server) arrive(ctx context.Context, method string) (context.Context, *call, place, error) {
	id := s.authn.Identify(ctx)
	c := &call{arrived: true}
	ctx = context.WithValue(access.WithIdentity(ctx, id), callKey{}, c)
	p, err := s.limits.enter(ctx, method, false)
	if err == nil && id.Subject.Name == "" {
		if _, err = s.policy.Admit(method, id); err != nil {
			s.limits.leave(p)
		}
	}
	return ctx, c, p, err
}

// limitUnary refuses a call that was refused before its request was read.
func (s *Server) limitUnary(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	if c, ok := ctx.Value(callKey{}).(*call); ok && c.refused != nil {
		return nil, c.refused
	}
	return handler(ctx, req)
}

func (s *Server) limitStream(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	p, err := s.limits.enter(stream.Context(), info.FullMethod, true)
	if err != nil {
		return err
	}
	defer s.limits.leave(p)
	return handler(srv, stream)
}
