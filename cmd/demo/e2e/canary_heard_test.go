package e2e

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc/stats"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
)

// heard keeps all that a client is told: every message, header, trailer and error,
// of streams as well. It is a stats.Handler.
type heard struct {
	mu              sync.Mutex
	answers, errors bytes.Buffer
	called          map[string]bool
}

func newHeard() *heard { return &heard{called: map[string]bool{}} }

// TagRPC notes the method.
func (h *heard) TagRPC(ctx context.Context, info *stats.RPCTagInfo) context.Context {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.called[info.FullMethodName] = true
	return ctx
}

// HandleRPC notes what has come.
func (h *heard) HandleRPC(_ context.Context, s stats.RPCStats) {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch s := s.(type) {
	case *stats.InHeader:
		fmt.Fprintln(&h.answers, s.Header)
	case *stats.InTrailer:
		fmt.Fprintln(&h.answers, s.Trailer)
	case *stats.InPayload:
		if m, ok := s.Payload.(proto.Message); ok {
			note(&h.answers, withoutToken(m))
		}
	case *stats.End:
		if s.Error == nil {
			return
		}
		st := status.Convert(s.Error)
		note(&h.errors, st.Proto())
		fmt.Fprintln(&h.errors, s.Error, st.Details())
	}
}

// fromInside notes a call that a container has made, and what it was told but for the
// answer itself.
func (h *heard) fromInside(method, message string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.called[method] = true
	fmt.Fprintln(&h.errors, message)
}

// withoutToken takes the token out of the one answer that shows it.
func withoutToken(m proto.Message) proto.Message {
	if made, ok := m.(*workspacev1.CreateTokenResponse); ok {
		made = proto.CloneOf(made)
		made.Secret = ""
		return made
	}
	return m
}

// note writes a message as it is on the wire and as people see it.
func note(to *bytes.Buffer, m proto.Message) {
	wire, err := proto.Marshal(m)
	if err != nil {
		panic(err) // it has come over the wire
	}
	to.Write(wire)
	fmt.Fprintf(to, "\n%s\n", prototext.Format(m))
}

// TagConn implements stats.Handler.
func (h *heard) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }

// HandleConn implements stats.Handler.
func (h *heard) HandleConn(context.Context, stats.ConnStats) {}

// take returns what has come since the last time.
func (h *heard) take() (answers, errors []byte) {
	h.mu.Lock()
	defer h.mu.Unlock()
	answers, errors = bytes.Clone(h.answers.Bytes()), bytes.Clone(h.errors.Bytes())
	h.answers.Reset()
	h.errors.Reset()
	return answers, errors
}

// checkAllCalled says which RPCs of the API no route has called.
func (h *heard) checkAllCalled(t *testing.T) {
	t.Helper()
	missing := map[string]bool{}
	protoregistry.GlobalFiles.RangeFilesByPackage("workspace.v1", func(f protoreflect.FileDescriptor) bool {
		for i := range f.Services().Len() {
			service := f.Services().Get(i)
			for j := range service.Methods().Len() {
				missing[fmt.Sprintf("/%s/%s", service.FullName(), service.Methods().Get(j).Name())] = true
			}
		}
		return true
	})
	all := len(missing)
	h.mu.Lock()
	defer h.mu.Unlock()
	maps.DeleteFunc(missing, func(method string, _ bool) bool { return h.called[method] })
	if len(missing) > 0 {
		t.Errorf("no route calls %s: it needs a row in canary_routes_test.go, or in askAll", strings.Join(slices.Sorted(maps.Keys(missing)), ", "))
	}
	if all < 17 {
		t.Errorf("only %d RPCs are known", all)
	}
}

// askAll calls what only reads, and what changes nothing any more.
func (s *canaries) askAll() {
	s.t.Helper()
	name, c := "workspaces/"+s.control+"-set", s.client()
	admin := workspacev1.NewAdminControlClient(s.Daemon.Conn())
	for _, call := range []func() (proto.Message, error){
		func() (proto.Message, error) {
			return c.ListWorkspaces(s.ctx, &workspacev1.ListWorkspacesRequest{})
		},
		func() (proto.Message, error) {
			return c.ListSecrets(s.ctx, &workspacev1.ListSecretsRequest{Parent: name})
		},
		func() (proto.Message, error) {
			return c.ListSecrets(s.ctx, &workspacev1.ListSecretsRequest{Parent: "global"})
		},
		func() (proto.Message, error) {
			return c.GetSecret(s.ctx, &workspacev1.GetSecretRequest{Name: name + "/secrets/OWN"})
		},
		func() (proto.Message, error) {
			return admin.GetServerInfo(s.ctx, &workspacev1.GetServerInfoRequest{})
		},
	} {
		if _, err := call(); err != nil {
			s.t.Error(err)
		}
	}
}
