package server_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	goruntime "runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/descriptorpb"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/server"
	"github.com/workspaced/workspaced/server/access"
	"github.com/workspaced/workspaced/server/servertest"
)

// attack is one way not to get in.
type attack struct {
	name  string
	calls int
	// call makes the i-th and returns its error.
	call func(ctx context.Context, r *rand.Rand, i int) error
	// want are the codes that it may come to.
	want []codes.Code
}

// attacks are 10,000 calls, none of which may change anything.
func attacks(t *testing.T, h *harness) []attack {
	all := ourRPCs(t)
	var changes, refused []protoreflect.MethodDescriptor // refused: to a workspace, about another one
	for _, m := range all {
		if hasSideEffects(m) {
			changes = append(changes, m)
		}
		if _, about := requestFor(t, m, foreign); verdict(declared(m), workspacev1.Role_ROLE_WORKSPACE, false, foreign, about) != "" {
			refused = append(refused, m)
		}
	}
	as := func(name string, roles ...workspacev1.Role) *servertest.Client {
		s := access.Subject{Name: name}
		if len(roles) > 0 {
			s.Grants = []access.Grant{{Roles: access.RolesOf(roles...), Scope: access.Scope{}}}
		}
		return must2(h.As(s))(t)
	}
	// Who may do everything can still send what is none.
	admin := as("attacker", workspacev1.Role_ROLE_ADMIN)
	nobody, stranger, viewer := as(""), as("stranger"), as("viewer", workspacev1.Role_ROLE_VIEWER)
	everyWorkspace := as("every workspace", workspacev1.Role_ROLE_WORKSPACE)
	workspace := must2(h.As(access.Subject{Name: "workspace", Grants: []access.Grant{{
		Roles: access.RolesOf(workspacev1.Role_ROLE_WORKSPACE), Scope: access.Scope{Workspaces: own},
	}}}))(t)
	targets := []string{own, foreign, absent, daemon}
	proper := func(client *servertest.Client, methods []protoreflect.MethodDescriptor) func(context.Context, *rand.Rand, int) error {
		return func(ctx context.Context, r *rand.Rand, i int) error {
			m := methods[i%len(methods)]
			req, _ := requestFor(t, m, targets[r.IntN(len(targets))])
			if f := field(req.ProtoReflect(), "validate_only"); f != nil {
				req.ProtoReflect().Set(f, protoreflect.ValueOfBool(false))
			}
			return callAny(ctx, client.Conn, m, req)
		}
	}
	raw := func(client *servertest.Client, method string, body []byte) func(context.Context) error {
		return func(ctx context.Context) error {
			stream, err := client.Conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, method, grpc.ForceCodecV2(rawCodec{}))
			if err != nil {
				return err
			}
			if err := errors.Join(stream.SendMsg(body), stream.CloseSend()); err != nil && !errors.Is(err, io.EOF) {
				return err
			}
			if err := stream.RecvMsg(&struct{}{}); !errors.Is(err, io.EOF) {
				return err
			}
			return nil
		}
	}
	return []attack{
		{"malformed", 3000, func(ctx context.Context, r *rand.Rand, i int) error {
			body := []byte{7} // no field has number 0, no type is 7
			for range r.IntN(2000) {
				body = append(body, byte(r.Uint32()))
			}
			return raw(admin, access.FullMethod(all[i%len(all)]), body)(ctx)
		}, []codes.Code{codes.Internal, codes.InvalidArgument}}, // gRPC's own answer, and ours in a stream
		{"invalid", 2000, func(ctx context.Context, r *rand.Rand, i int) error {
			m := changes[i%len(changes)]
			req, _ := requestFor(t, m, own)
			spoil(r, req.ProtoReflect())
			client := admin
			if slices.Equal(declared(m).GetRoles(), []workspacev1.Role{workspacev1.Role_ROLE_WORKSPACE}) {
				client = everyWorkspace // the admin may not call it at all
			}
			return callAny(ctx, client.Conn, m, req)
		}, []codes.Code{codes.InvalidArgument}},
		{"oversized", 20, func(ctx context.Context, _ *rand.Rand, i int) error {
			return raw(admin, access.FullMethod(all[i%len(all)]), make([]byte, server.MaxRequestBytes+1))(ctx)
		}, []codes.Code{codes.ResourceExhausted}},
		{"no such method", 980, func(ctx context.Context, r *rand.Rand, i int) error {
			services := []string{"workspace.v1.WorkspaceControl", "workspace.v1.AdminControl", "workspace.v2.AdminControl", "x"}
			return raw(stranger, fmt.Sprintf("/%s/M%d", services[i%len(services)], r.Uint32()), nil)(ctx)
		}, []codes.Code{codes.Unimplemented, codes.PermissionDenied}},
		{"unauthenticated", 2000, proper(nobody, all), []codes.Code{codes.Unauthenticated}},
		{"without a role", 1000, proper(stranger, all), []codes.Code{codes.PermissionDenied}},
		{"of the wrong role", 500, proper(viewer, changes), []codes.Code{codes.PermissionDenied}},
		{"about another workspace", 500, func(ctx context.Context, _ *rand.Rand, i int) error {
			req, _ := requestFor(t, refused[i%len(refused)], foreign)
			return callAny(ctx, workspace.Conn, refused[i%len(refused)], req)
		}, []codes.Code{codes.PermissionDenied}},
	}
}

// spoil makes one field of a request, of those that carry text, one that no rule
// can like, or leaves out the one that has all others.
func spoil(r *rand.Rand, m protoreflect.Message) {
	bad := strings.Repeat(string(rune(1+r.IntN(8))), 129+r.IntN(1000))
	for _, name := range []string{"request_id", "name", "parent", "workspace_id"} {
		if f := field(m, name); f != nil && f.Kind() == protoreflect.StringKind {
			m.Set(f, protoreflect.ValueOfString(bad))
			return
		}
	}
	if f := field(m, "token"); f != nil { // without which there is none to be made
		m.Clear(f)
		return
	}
	panic("teach spoil what " + string(m.Descriptor().FullName()) + " is made of")
}

// Whatever is sent by whomever: nobody gets in, nothing changes or crashes, no
// memory is kept, and the audit log counts each call.
func TestAttacks(t *testing.T) {
	quiet := servertest.WithLogger(slog.New(slog.DiscardHandler))
	run(t, func(t *testing.T, h *harness) {
		for _, id := range []string{own, foreign} {
			h.create(id, func(r *createReq) { r.Secrets = []*secret{text("KEY", "v")} })
		}
		advance(time.Minute)
		before, log := h.state(), h.audit(&listAudit{})
		heap := liveHeap()

		made := make(map[string]int)
		for _, a := range attacks(t, h) {
			made[a.name] = a.calls
			a.run(t, h)
		}
		total := 0
		for _, n := range made {
			total += n
		}
		if total != 10_000 {
			t.Errorf("%d calls", total)
		}

		if diff := cmp.Diff(before, h.state(), protocmp.Transform()); diff != "" {
			t.Errorf("something has changed: %s", diff)
		}
		advance(time.Minute) // refusals are written a moment later
		counted := 0
		for _, e := range h.audit(&listAudit{})[len(log):] {
			counted += int(e.GetCount())
			if e.GetCode() == "OK" || e.GetCode() == "UNKNOWN" {
				t.Errorf("in the audit log: %v", e)
			}
		}
		if counted != total {
			t.Errorf("the audit log counts %d of %d calls", counted, total)
		}
		if grown := int64(liveHeap()) - int64(heap); grown > 16<<20 {
			t.Errorf("%d bytes of memory are kept", grown)
		}
	}, quiet)
}

// run makes the calls, some at a time.
func (a *attack) run(t *testing.T, h *harness) {
	t.Helper()
	const callers = 8
	var wg sync.WaitGroup
	for c := range callers {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(c), 1))
			for i := c; i < a.calls; i += callers {
				err := a.call(h.ctx(), r, i)
				code := codeOf(err)
				if !slices.Contains(a.want, code) {
					t.Errorf("%s, call %d: got %v, want %v", a.name, i, err, a.want)
					return
				}
				if code == codes.Internal && !strings.Contains(err.Error(), "unmarshal") {
					t.Errorf("%s, call %d: %v", a.name, i, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// liveHeap is the size of what is reachable.
func liveHeap() uint64 {
	goruntime.GC()
	goruntime.GC()
	var m goruntime.MemStats
	goruntime.ReadMemStats(&m)
	return m.HeapAlloc
}

// hasSideEffects reports whether the .proto says nothing else of an RPC.
func hasSideEffects(m protoreflect.MethodDescriptor) bool {
	options, _ := m.Options().(*descriptorpb.MethodOptions)
	return options.GetIdempotencyLevel() != descriptorpb.MethodOptions_NO_SIDE_EFFECTS
}
