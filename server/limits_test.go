package server_test

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/server"
	"github.com/workspaced/workspaced/server/access"
	"github.com/workspaced/workspaced/server/servertest"
)

// A call beyond the rate is refused with when to try again, before its request is
// read, and is in the audit log; when that time has come it is not.
func TestLimits_Rate(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		get := func() error {
			_, err := h.Client.ListWorkspaces(h.ctx(), &workspacev1.ListWorkspacesRequest{})
			return err
		}
		for range 10 {
			must(t, 0, get())
		}
		err := get()
		wantCode(t, err, codes.ResourceExhausted, server.ReasonRateLimited)
		wait := detail[*errdetails.RetryInfo](err).GetRetryDelay().AsDuration()
		if wait != 200*time.Millisecond || detail[*errdetails.QuotaFailure](err).GetViolations()[0].GetSubject() == "" {
			t.Errorf("again in %v: %v", wait, err)
		}
		large := h.Conn.Invoke(h.ctx(), "/workspace.v1.WorkspaceControl/GetWorkspace", make([]byte, 5<<20), &struct{}{}, grpc.ForceCodecV2(rawCodec{}))
		wantCode(t, large, codes.ResourceExhausted, server.ReasonRateLimited)
		advance(wait)
		must(t, 0, get())
		advance(time.Minute)
		var limited int64
		for _, e := range h.audit(&listAudit{Code: "RESOURCE_EXHAUSTED"}) {
			if e.GetReason() == server.ReasonRateLimited && e.GetSubject() != "" {
				limited += e.GetCount()
			}
		}
		if limited != 2 {
			t.Errorf("%d refusals are in the audit log", limited)
		}
	}, servertest.WithLimits(server.Limits{Rate: 5}))
}

// A stream beyond the limit is refused; one that ends makes room.
func TestLimits_Streams(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		watch := func() (func(), error) {
			ctx, cancel := context.WithCancel(h.ctx())
			stream := must2(h.Client.WatchWorkspaces(ctx, &workspacev1.WatchWorkspacesRequest{}))(t)
			_, err := stream.Recv()
			return cancel, err
		}
		first, err := watch()
		must(t, 0, err)
		_, err = watch()
		must(t, 0, err)
		_, err = watch()
		wantCode(t, err, codes.ResourceExhausted, server.ReasonTooManyStreams)
		first()
		synctest.Wait()
		_, err = watch()
		must(t, 0, err)
	}, servertest.WithLimits(server.Limits{Streams: 2}))
}

// Nobody's request is not read, however large it is.
func TestLimits_NobodyIsNotRead(t *testing.T) {
	s := server.New(server.Config{Store: &faultyStore{}, Logger: slog.New(slog.DiscardHandler)})
	conn := listen(t, s, access.Subject{})
	err := conn.Invoke(t.Context(), "/workspace.v1.WorkspaceControl/GetWorkspace", make([]byte, 5<<20), &struct{}{}, grpc.ForceCodecV2(rawCodec{}))
	wantCode(t, err, codes.Unauthenticated, server.ReasonNoCredentials)
}

// A call with more metadata than anybody needs is refused, and nothing but it.
func TestLimits_Metadata(t *testing.T) {
	s := server.New(server.Config{Store: &faultyStore{}, Logger: slog.New(slog.DiscardHandler), Health: access.ExposurePublic})
	client := healthv1.NewHealthClient(listen(t, s, access.Everything("test")))
	err := healthCheck(t, client, strings.Repeat("x", 100<<10))
	if err == nil {
		t.Error("it was taken")
	}
	must(t, 0, healthCheck(t, client, "x"))
}

func healthCheck(t *testing.T, client healthv1.HealthClient, meta string) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	_, err := client.Check(metadata.AppendToOutgoingContext(ctx, "x-large", meta), &healthv1.HealthCheckRequest{}, grpc.WaitForReady(true))
	return err
}

// Slowloris: a thousand connections that say nothing keep nobody out, take little
// memory, and are closed after a while.
func TestLimits_IdleConnections(t *testing.T) {
	const idle = 1000
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	bounded := server.BoundConnections(tcp, 4096)
	s := server.New(server.Config{Store: &faultyStore{}, Logger: slog.New(slog.DiscardHandler), Health: access.ExposurePublic})
	g := s.NewGRPC(grpc.WaitForHandlers(true), grpc.Creds(access.Fixed(access.Subject{})), grpc.ConnectionTimeout(2*time.Second))
	served := make(chan error, 1)
	go func() { served <- g.Serve(bounded) }()
	defer func() {
		g.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	}()
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	var conns []net.Conn
	defer func() {
		for _, c := range conns {
			_ = c.Close()
		}
	}()
	for range idle {
		c, err := net.DialTimeout("tcp", tcp.Addr().String(), 10*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, c)
	}
	conn, err := grpc.NewClient("passthrough:///"+tcp.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	must(t, 0, healthCheck(t, healthv1.NewHealthClient(conn), "x"))
	runtime.GC()
	runtime.ReadMemStats(&after)
	perConn := (int64(after.HeapInuse+after.StackInuse) - int64(before.HeapInuse+before.StackInuse)) / idle
	t.Logf("an idle connection takes %d bytes, with the client's end", perConn)
	if perConn > 80<<10 {
		t.Errorf("an idle connection takes %d bytes", perConn)
	}
	// Each silent one is closed in the end.
	_ = conns[0].SetReadDeadline(time.Now().Add(30 * time.Second))
	if _, err := io.Copy(io.Discard, conns[0]); err != nil && os.IsTimeout(err) {
		t.Error("a silent connection is still open")
	}
}

// One address has at most half of all connections, so that others get in.
func TestBoundConnections_Address(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	bounded := server.BoundConnections(l, 4)
	defer bounded.Close()
	accepted := make(chan net.Conn)
	go func() {
		defer close(accepted)
		for {
			c, err := bounded.Accept()
			if err != nil {
				return
			}
			accepted <- c
		}
	}()
	for i, from := range []string{"127.0.0.1", "127.0.0.1", "127.0.0.2", "127.0.0.1"} {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}, Timeout: 10 * time.Second}
		c := must2(d.DialContext(t.Context(), "tcp", l.Addr().String()))(t)
		defer c.Close()
		if i < 3 {
			defer (<-accepted).Close()
			continue
		}
		_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
		if _, err := c.Read(make([]byte, 1)); err == nil || os.IsTimeout(err) || bounded.Refused() != 1 {
			t.Errorf("a third one of the same address: %v, %d refused", err, bounded.Refused())
		}
	}
}

// A unix socket's connections are counted together, and each one's end makes room.
func TestBoundConnections(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	bounded := server.BoundConnections(l, 2)
	accepted := make(chan net.Conn, 10)
	go func() {
		for {
			c, err := bounded.Accept()
			if err != nil {
				close(accepted)
				return
			}
			accepted <- c
		}
	}()
	dial := func() net.Conn {
		return must2(net.Dial("unix", path))(t)
	}
	first := dial()
	defer first.Close()
	second := dial()
	defer second.Close()
	a, b := <-accepted, <-accepted
	third := dial()
	defer third.Close()
	if _, err := third.Read(make([]byte, 1)); err == nil || bounded.Refused() != 1 {
		t.Errorf("a third one: %v, %d refused", err, bounded.Refused())
	}
	_, isUnix := a.(interface{ NetConn() net.Conn }).NetConn().(*net.UnixConn)
	if !isUnix {
		t.Errorf("what is behind it is a %T", a)
	}
	for range 2 { // closing twice makes room for one
		_ = a.Close()
	}
	fourth := dial()
	defer fourth.Close()
	<-accepted
	fifth := dial()
	defer fifth.Close()
	if _, err := fifth.Read(make([]byte, 1)); err == nil {
		t.Error("there was room for two")
	}
	_ = b.Close()
	_ = l.Close()
	for range accepted {
	}
	if got := fmt.Sprint(bounded.Addr()); got != path {
		t.Errorf("address %s", got)
	}
}
