package server

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/peer"

	"github.com/workspaced/workspaced/server/access"
)

const aMethod, otherMethod = "/workspace.v1.WorkspaceControl/SetSecret", "/workspace.v1.WorkspaceControl/GetSecret"

func asSubject(name string) context.Context {
	return access.WithSubject(context.Background(), access.Subject{Name: name})
}

// asNobody is a call from an address, or by a unix socket.
func asNobody(address string) context.Context {
	if address == "" {
		return peer.NewContext(context.Background(), &peer.Peer{Addr: &net.UnixAddr{Net: "unix"}})
	}
	return peer.NewContext(context.Background(), &peer.Peer{Addr: net.TCPAddrFromAddrPort(netip.MustParseAddrPort(address))})
}

// let makes calls that end at once and returns how many were let in, and why the
// first one was not.
func (l *limiter) let(ctx context.Context, method string, n int) (in int, why string, wait time.Duration) {
	for range n {
		p, err := l.enter(ctx, method, false)
		if err == nil {
			in++
			l.leave(p)
			continue
		}
		var api *apiError
		if errors.As(err, &api) && why == "" {
			why = api.reason
			for _, d := range api.details {
				if retry, ok := d.(*errdetails.RetryInfo); ok {
					wait = retry.GetRetryDelay().AsDuration()
				}
			}
		}
	}
	return in, why, wait
}

func TestLimiter_Rates(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLimiter(Limits{Rate: 10, NobodyRate: 2, MethodRates: map[string]int{"SetSecret": 1}})
		want := func(ctx context.Context, method string, calls, in int) {
			t.Helper()
			got, why, wait := l.let(ctx, method, calls)
			if got != in || (calls == in) != (why == "") || why != "" && (why != ReasonRateLimited || wait <= 0 || wait > time.Second) {
				t.Errorf("%d of %d, %q, again in %v; want %d", got, calls, why, wait, in)
			}
		}
		want(asSubject("a"), otherMethod, 25, 20)
		want(asSubject("b"), otherMethod, 20, 20) // another's are its own
		<-time.After(time.Second)
		want(asSubject("a"), otherMethod, 15, 10)
		<-time.After(time.Minute)
		want(asSubject("a"), aMethod, 5, 2)
		want(asSubject("a"), otherMethod, 19, 18) // what was refused took nothing
		want(asNobody("10.0.0.1:1"), otherMethod, 5, 4)
		want(asNobody("10.0.0.1:2"), otherMethod, 1, 0)
		want(asNobody("10.0.0.2:1"), otherMethod, 5, 4)
		want(asNobody("[fd00::1]:1"), otherMethod, 5, 4)
		want(asNobody("[fd00::2]:1"), otherMethod, 1, 0) // of the same subscriber
		want(asNobody("[fd00:0:0:1::1]:1"), otherMethod, 5, 4)
		want(asNobody(""), otherMethod, 5, 4)
		if n := l.refused[ReasonRateLimited]; n != 5+5+3+1+1+1+1+1+1+1+1 {
			t.Errorf("%d refusals were counted", n)
		}
	})
}

func TestLimiter_InFlight(t *testing.T) {
	l := newLimiter(Limits{Calls: 3, Streams: 2})
	var in []place
	enter := func(stream bool, reason string) {
		t.Helper()
		p, err := l.enter(asSubject("a"), aMethod, stream)
		var api *apiError
		if errors.As(err, &api) != (reason != "") || reason != "" && api.reason != reason {
			t.Fatalf("got %v, want %q", err, reason)
		}
		if err == nil {
			in = append(in, p)
		}
	}
	enter(true, "")
	enter(true, "")
	enter(true, ReasonTooManyStreams)
	enter(false, "")
	enter(false, ReasonTooManyCalls)
	if _, err := l.enter(asSubject("b"), aMethod, true); err != nil {
		t.Error(err)
	}
	l.leave(in[0])
	enter(true, "")
	l.leave(in[2])
	enter(false, "")
	enter(false, ReasonTooManyCalls)
}

// However many callers come, those that are told apart are bounded, nobody who is in
// flight is forgotten, and once they have gone there is room for others.
func TestLimiter_IsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLimiter(Limits{Rate: 10, NobodyRate: 5, Calls: 1})
		if _, err := l.enter(asSubject("stays"), aMethod, false); err != nil {
			t.Fatal(err)
		}
		in := 0
		for i := range 3 * maxCallers {
			n, _, _ := l.let(asNobody(fmt.Sprintf("10.%d.%d.%d:1", i>>16, i>>8&255, i&255)), aMethod, 1)
			in += n
		}
		if n := len(l.callers); n != maxCallers+2 {
			t.Errorf("%d callers are told apart", n)
		}
		if want := maxCallers + 10; in != want { // those who share a place share a rate
			t.Errorf("%d were let in, want %d", in, want)
		}
		if n, _, _ := l.let(asSubject("new"), aMethod, 1); n != 1 {
			t.Error("those who are nobody take the places of those with a name")
		}
		in = 0
		for i := range 3 * maxCallers {
			n, _, _ := l.let(asSubject(fmt.Sprint("s", i)), aMethod, 1)
			in += n
		}
		if want := maxCallers - 2 + 20; in != want || len(l.callers) != 2*maxCallers+2 {
			t.Errorf("%d with a name were let in, want %d; %d are told apart", in, want, len(l.callers))
		}
		<-time.After(callerIdle)
		if n, _, _ := l.let(asSubject("newer"), aMethod, 20); n != 20 {
			t.Errorf("%d of a new caller's were let in after the others have gone", n)
		}
		if n, why, _ := l.let(asSubject("stays"), aMethod, 1); n != 0 || why != ReasonTooManyCalls {
			t.Errorf("who has a call in flight was forgotten: %d, %s", n, why)
		}
		if n := len(l.callers); n > 3 {
			t.Errorf("%d callers are remembered", n)
		}
	})
}

// A container takes no place here, however many there are: it has bounds of its own.
func TestLimiter_Containers(t *testing.T) {
	l := newLimiter(Limits{Rate: 1, Calls: 1})
	for i := range 3 {
		subject := access.Subject{Name: "workspace:a", Instance: &access.Instance{ID: "a-1"}}
		p, err := l.enter(access.WithSubject(t.Context(), subject), aMethod, false)
		if err != nil {
			t.Fatalf("call %d: %v", i, err)
		}
		defer l.leave(p)
	}
	if n := len(l.callers); n != 0 {
		t.Errorf("%d callers are told apart", n)
	}
}

func TestLimiter_NoLimits(t *testing.T) {
	l := newLimiter(Limits{})
	for range 1000 {
		if _, err := l.enter(asNobody("10.0.0.1:1"), aMethod, true); err != nil {
			t.Fatal(err)
		}
	}
}
