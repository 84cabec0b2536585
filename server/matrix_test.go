package server_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"buf.build/go/protovalidate"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/server"
	"github.com/workspaced/workspaced/server/access"
)

// registered are the RPCs of all services that the gRPC server has.
func registered(t *testing.T) map[string][]protoreflect.MethodDescriptor {
	t.Helper()
	all := make(map[string][]protoreflect.MethodDescriptor)
	g := server.New(server.Config{Logger: slog.New(slog.DiscardHandler)}).NewGRPC()
	for name := range g.GetServiceInfo() {
		d, err := protoregistry.GlobalFiles.FindDescriptorByName(protoreflect.FullName(name))
		if err != nil {
			t.Fatal(err)
		}
		methods := d.(protoreflect.ServiceDescriptor).Methods()
		for i := range methods.Len() {
			all[name] = append(all[name], methods.Get(i))
		}
	}
	return all
}

// ourRPCs are those of WorkspaceControl and AdminControl.
func ourRPCs(t *testing.T) (ours []protoreflect.MethodDescriptor) {
	t.Helper()
	for service, methods := range registered(t) {
		if strings.HasPrefix(service, "workspace.v1.") {
			ours = append(ours, methods...)
		}
	}
	if len(ours) < 17 {
		t.Fatalf("only %d RPCs", len(ours))
	}
	return ours
}

func declared(m protoreflect.MethodDescriptor) *workspacev1.Access {
	options, _ := m.Options().(*descriptorpb.MethodOptions)
	a, _ := proto.GetExtension(options, workspacev1.E_Access).(*workspacev1.Access)
	return a
}

// Each RPC of ours says who may call it, and the server has no services but ours
// and those whose exposure is configured.
func TestEveryRPCDeclaresItsAccess(t *testing.T) {
	for _, m := range ourRPCs(t) {
		if len(declared(m).GetRoles()) == 0 {
			t.Errorf("%s declares no role", m.FullName())
		}
	}
	for service := range registered(t) {
		if !strings.HasPrefix(service, "workspace.v1.") && !slices.Contains([]string{
			"grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection",
		}, service) {
			t.Errorf("nobody decides who may call %s", service)
		}
	}
}

// What the matrix calls RPCs about.
const (
	own     = "own-1"
	foreign = "foreign-1"
	absent  = "absent-1" // as foreign, and not there
	daemon  = ""         // no workspace: global secrets
)

// requestFor makes a request about a workspace that changes nothing if it can be
// helped. It reports whether the RPC is about one at all.
func requestFor(t *testing.T, m protoreflect.MethodDescriptor, id string) (proto.Message, bool) {
	t.Helper()
	kind, err := protoregistry.GlobalTypes.FindMessageByName(m.Input().FullName())
	if err != nil {
		t.Fatal(err)
	}
	req := kind.New()
	if f := field(req, "validate_only"); f != nil {
		req.Set(f, protoreflect.ValueOfBool(true))
	}
	name, secrets, global := "workspaces/"+id, "workspaces/"+id+"/secrets/KEY", "global"
	if id == daemon {
		name, secrets = "", "secrets/KEY"
	}
	about := false
	set := func(f string, candidates ...string) {
		at := field(req, f)
		if at == nil {
			return
		}
		for _, c := range candidates {
			req.Set(at, protoreflect.ValueOfString(c))
			if c != "" && accepts(t, req.Interface(), f) {
				about = true
				return
			}
		}
		if id != daemon { // of the daemon there may be nothing under this field
			t.Fatalf("%s: teach requestFor what %s is made of", m.FullName(), f)
		}
	}
	labels := map[string]string{"team": strings.TrimSuffix(id, "-1")}
	switch r := req.Interface().(type) {
	case *workspacev1.CreateWorkspaceRequest:
		r.WorkspaceId, r.Workspace = id, &ws{Spec: spec(), Labels: labels}
		return r, id != daemon
	case *workspacev1.UpdateWorkspaceRequest:
		r.Workspace = &ws{Name: name, Spec: spec(), Labels: labels}
		return r, id != daemon
	}
	set("name", name, secrets, secrets+"/versions/1", "tokens/none")
	if id == daemon {
		set("parent", global, secrets)
	} else {
		set("parent", name, secrets)
	}
	if f := field(req, "version"); f != nil {
		req.Set(f, protoreflect.ValueOfInt64(1))
	}
	return req.Interface(), about
}

func field(m protoreflect.Message, name string) protoreflect.FieldDescriptor {
	return m.Descriptor().Fields().ByName(protoreflect.Name(name))
}

// accepts reports whether the rules in the .proto have nothing against a field.
func accepts(t *testing.T, m proto.Message, name string) bool {
	t.Helper()
	var invalid *protovalidate.ValidationError
	if err := protovalidate.Validate(m); err != nil && !errors.As(err, &invalid) {
		t.Fatal(err)
	}
	return invalid == nil || !slices.ContainsFunc(invalid.Violations, func(v *protovalidate.Violation) bool {
		return protovalidate.FieldPathString(v.Proto.GetField()) == name
	})
}

// callAny calls an RPC of any kind and returns its error: nil also for a stream
// that has begun.
func callAny(ctx context.Context, conn *grpc.ClientConn, m protoreflect.MethodDescriptor, req proto.Message) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	kind, err := protoregistry.GlobalTypes.FindMessageByName(m.Output().FullName())
	if err != nil {
		return err
	}
	resp := kind.New().Interface()
	if !m.IsStreamingClient() && !m.IsStreamingServer() {
		return conn.Invoke(ctx, access.FullMethod(m), req, resp)
	}
	stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, access.FullMethod(m))
	if err != nil {
		return err
	}
	if err := errors.Join(stream.SendMsg(req), stream.CloseSend()); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if err := stream.RecvMsg(resp); !errors.Is(err, io.EOF) {
		return err
	}
	return nil
}

// A role as the matrix understands it, which is not how the server does.
var contains = map[workspacev1.Role][]workspacev1.Role{
	workspacev1.Role_ROLE_VIEWER:        {workspacev1.Role_ROLE_VIEWER},
	workspacev1.Role_ROLE_OPERATOR:      {workspacev1.Role_ROLE_OPERATOR, workspacev1.Role_ROLE_VIEWER},
	workspacev1.Role_ROLE_SECRET_WRITER: {workspacev1.Role_ROLE_SECRET_WRITER, workspacev1.Role_ROLE_VIEWER},
	workspacev1.Role_ROLE_ADMIN: {
		workspacev1.Role_ROLE_ADMIN, workspacev1.Role_ROLE_SECRET_WRITER, workspacev1.Role_ROLE_OPERATOR, workspacev1.Role_ROLE_VIEWER,
	},
	workspacev1.Role_ROLE_WORKSPACE: {workspacev1.Role_ROLE_WORKSPACE},
}

// scopes of the matrix's callers.
var matrixScopes = map[string]access.Scope{
	"everywhere": {},
	"by id":      {Workspaces: own},
	"by prefix":  {Workspaces: "own-*"},
	"by label":   {Labels: map[string]string{"team": "own"}},
}

// verdict is what has to become of a call: the reason of its refusal; empty: it is
// not refused.
func verdict(a *workspacev1.Access, role workspacev1.Role, everywhere bool, target string, about bool) string {
	has := slices.ContainsFunc(a.GetRoles(), func(r workspacev1.Role) bool { return slices.Contains(contains[role], r) })
	switch {
	case role == workspacev1.Role_ROLE_UNSPECIFIED, !has:
		return server.ReasonRoleMissing
	case everywhere, a.GetTarget() == workspacev1.AccessTarget_ACCESS_TARGET_FILTERED:
		return ""
	case a.GetTarget() == workspacev1.AccessTarget_ACCESS_TARGET_WORKSPACE && about && target == own:
		return ""
	}
	return server.ReasonOutOfScope
}

// Every RPC, as every role, everywhere or in a scope, about a workspace in it, one
// outside, one that is not there, and about none.
func TestRoleMatrix(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		for _, id := range []string{own, foreign} {
			h.create(id, func(r *createReq) {
				r.Workspace.Labels = map[string]string{"team": strings.TrimSuffix(id, "-1")}
				r.Secrets = []*secret{text("KEY", "v")}
			})
		}
		roles := []workspacev1.Role{workspacev1.Role_ROLE_UNSPECIFIED}
		for role := range contains {
			roles = append(roles, role)
		}
		slices.Sort(roles)
		if len(roles) != len(workspacev1.Role_name) {
			t.Fatalf("the matrix has the roles %v", roles)
		}
		calls := 0
		for scopeName, scope := range matrixScopes {
			for _, role := range roles {
				subject := access.Subject{Name: "caller", Grants: []access.Grant{{Roles: access.RolesOf(role), Scope: scope}}}
				client := must2(h.As(subject))(t)
				for _, m := range ourRPCs(t) {
					for _, target := range []string{own, foreign, absent, daemon} {
						calls++
						req, about := requestFor(t, m, target)
						want := verdict(declared(m), role, scopeName == "everywhere", target, about)
						err := callAny(h.ctx(), client.Conn, m, req)
						if got := refusal(err); got != want {
							t.Errorf("%s %s, %s about %q: refused %q (%v), want %q", access.RoleName(role), scopeName, m.Name(), target, got, err, want)
						}
						if want != "" {
							checkRefusal(t, m, target, about, err)
						}
					}
				}
			}
		}
		if calls < 1500 {
			t.Errorf("only %d calls", calls)
		}
		t.Logf("%d calls", calls)
	})
}

// refusal is the reason why a caller was refused; empty: it was not.
func refusal(err error) string {
	switch codeOf(err) {
	case codes.PermissionDenied, codes.Unauthenticated:
		return reasonOf(err)
	}
	return ""
}

// checkRefusal: it names RPC and role, and says nothing of the request or of what
// is there.
func checkRefusal(t *testing.T, m protoreflect.MethodDescriptor, target string, about bool, err error) {
	t.Helper()
	info := detail[*errdetails.ErrorInfo](err)
	if want := strings.TrimPrefix(access.FullMethod(m), "/"); info.GetMetadata()["method"] != want {
		t.Errorf("%s: got %v", m.Name(), info)
	}
	if !strings.Contains(info.GetMetadata()["role"], access.RoleName(declared(m).GetRoles()[0])) {
		t.Errorf("%s: no role in %v", m.Name(), info)
	}
	if n := len(status.Convert(err).Details()); n != 1 {
		t.Errorf("%s: %d details: %v", m.Name(), n, err)
	}
}

// Who may not see a workspace does not learn whether it is there, nor what would
// be wrong with a request.
func TestRefusalsDoNotTell(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		h.create(foreign, func(r *createReq) { r.Workspace.Labels = map[string]string{"team": "foreign"} })
		for name, scope := range matrixScopes {
			if name == "everywhere" {
				continue
			}
			client := must2(h.As(access.Subject{Name: "caller", Grants: []access.Grant{{
				Roles: access.RolesOf(workspacev1.Role_ROLE_OPERATOR, workspacev1.Role_ROLE_SECRET_WRITER), Scope: scope,
			}}}))(t)
			for _, m := range ourRPCs(t) {
				if declared(m).GetTarget() != workspacev1.AccessTarget_ACCESS_TARGET_WORKSPACE {
					continue
				}
				said := make(map[string]string)
				for _, id := range []string{foreign, absent} {
					req, _ := requestFor(t, m, id)
					for how, spoil := range map[string]func(protoreflect.Message){
						"good": func(protoreflect.Message) {},
						"bad": func(r protoreflect.Message) {
							if f := field(r, "request_id"); f != nil {
								r.Set(f, protoreflect.ValueOfString("has a space"))
							}
						},
					} {
						spoil(req.ProtoReflect())
						err := callAny(h.ctx(), client.Conn, m, req)
						said[id+" "+how] = strings.ReplaceAll(fmt.Sprint(status.Convert(err).Proto()), id, "ID")
					}
				}
				for k, v := range said {
					if v != said[foreign+" good"] {
						t.Errorf("%s, %s: %s is told from the other:\n%s\n%s", name, m.Name(), k, v, said[foreign+" good"])
					}
				}
			}
		}
	})
}

// Nobody, and somebody whose credentials count for nothing.
func TestNobody(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		client := must2(h.As(access.Subject{}))(t)
		for service, methods := range registered(t) {
			for _, m := range methods {
				if service == "grpc.health.v1.Health" {
					continue // public here
				}
				req := must2(protoregistry.GlobalTypes.FindMessageByName(m.Input().FullName()))(t).New().Interface()
				wantCode(t, callAny(h.ctx(), client.Conn, m, req), codes.Unauthenticated, server.ReasonNoCredentials)
			}
		}
		if !strings.Contains(h.log.String(), "grpc.code=Unauthenticated") {
			t.Error("the log does not tell")
		}
	})
}

// Health and reflection follow the configuration.
func TestExposure(t *testing.T) {
	callers := map[string]access.Subject{
		"nobody":  {},
		"no role": {Name: "x"},
		"viewer":  {Name: "x", Grants: []access.Grant{{Roles: access.RolesOf(workspacev1.Role_ROLE_VIEWER), Scope: access.Scope{Workspaces: "a"}}}},
	}
	want := map[access.Exposure]map[string]codes.Code{
		access.ExposurePublic:        {"nobody": codes.OK, "no role": codes.OK, "viewer": codes.OK},
		access.ExposureAuthenticated: {"nobody": codes.Unauthenticated, "no role": codes.PermissionDenied, "viewer": codes.OK},
		"":                           {"nobody": codes.Unauthenticated, "no role": codes.PermissionDenied, "viewer": codes.OK},
		access.ExposureOff:           {"nobody": codes.Unimplemented, "no role": codes.Unimplemented, "viewer": codes.Unimplemented},
	}
	for exposure, want := range want {
		for name, subject := range callers {
			t.Run(string(exposure)+"/"+name, func(t *testing.T) {
				s := server.New(server.Config{Store: &faultyStore{}, Logger: slog.New(slog.DiscardHandler), Health: exposure, Reflection: exposure})
				conn := listen(t, s, subject)
				got := map[string]codes.Code{}
				for service, methods := range registered(t) {
					if strings.HasPrefix(service, "workspace.v1.") {
						continue
					}
					for _, m := range methods {
						if m.Name() == "Watch" && exposure != access.ExposureOff { // never ends
							continue
						}
						req := must2(protoregistry.GlobalTypes.FindMessageByName(m.Input().FullName()))(t).New().Interface()
						code := codeOf(callAny(t.Context(), conn, m, req))
						if code == codes.InvalidArgument || code == codes.NotFound {
							code = codes.OK // it was looked at
						}
						got[string(m.FullName())] = code
					}
				}
				if len(got) < 3 {
					t.Errorf("only %v", got)
				}
				for m, code := range got {
					if diff := cmp.Diff(want[name], code); diff != "" {
						t.Errorf("%s: %s", m, diff)
					}
				}
			})
		}
	}
}
