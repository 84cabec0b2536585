package server_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/server"
	"github.com/workspaced/workspaced/server/access"
)

const (
	viewer = workspacev1.Role_ROLE_VIEWER
	admin  = workspacev1.Role_ROLE_ADMIN
)

// token makes a token and returns its record and a context that carries it.
func (h *harness) token(t *workspacev1.Token, ttl time.Duration) (*workspacev1.Token, context.Context) {
	h.t.Helper()
	req := &workspacev1.CreateTokenRequest{Token: t}
	if ttl > 0 {
		req.Ttl = durationpb.New(ttl)
	}
	resp := must2(h.Admin.CreateToken(h.ctx(), req))(h.t)
	return resp.GetToken(), bearer(h.ctx(), "Bearer "+resp.GetSecret())
}

func bearer(ctx context.Context, values ...string) context.Context {
	var pairs []string
	for _, v := range values {
		pairs = append(pairs, "authorization", v)
	}
	return metadata.AppendToOutgoingContext(ctx, pairs...)
}

func (h *harness) whoAmI(ctx context.Context) string {
	h.t.Helper()
	return must2(h.Admin.GetServerInfo(ctx, &workspacev1.GetServerInfoRequest{}))(h.t).GetCaller().GetSubject()
}

func (h *harness) tokens() []*workspacev1.Token {
	h.t.Helper()
	return must2(h.Admin.ListTokens(h.ctx(), &workspacev1.ListTokensRequest{}))(h.t).GetTokens()
}

// A token is its caller's identity, alone, wherever it comes from, and lasts over a
// restart of the daemon.
func TestTokens(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		h.create("a-1")
		h.create("b-1")
		begin := time.Now()
		spec := &workspacev1.Token{
			Name: "tokens/ignored", Subject: "ci", Roles: []workspacev1.Role{viewer}, Scope: &workspacev1.AccessScope{Workspaces: "a-*"},
		}
		made := must2(h.Admin.CreateToken(h.ctx(), &workspacev1.CreateTokenRequest{Token: spec}))(t)
		token, secret := made.GetToken(), made.GetSecret()
		if !strings.HasPrefix(secret, "wsd_") || len(secret) != 47 || token.GetPrefix() != secret[:12] {
			t.Errorf("the token is %q, its prefix %q", secret, token.GetPrefix())
		}
		want := proto.Clone(spec).(*workspacev1.Token)
		want.Creator = "test"
		if diff := cmp.Diff(want, token, protocmp.Transform(), protocmp.IgnoreFields(&workspacev1.Token{}, "name", "prefix", "create_time", "expire_time")); diff != "" {
			t.Error(diff)
		}
		if got := token.GetExpireTime().AsTime().Sub(begin); got != access.DefaultTokenTTL {
			t.Errorf("it lasts for %v", got)
		}
		ctx := bearer(h.ctx(), "bearer "+secret) // the scheme in any case
		for range 2 {
			info := must2(h.Admin.GetServerInfo(ctx, &workspacev1.GetServerInfoRequest{}))(t)
			if diff := cmp.Diff(&workspacev1.Caller{
				Subject: "token:ci", ExpireTime: token.GetExpireTime(),
				Grants: []*workspacev1.AccessGrant{{Roles: spec.GetRoles(), Scope: spec.GetScope()}},
			}, info.GetCaller(), protocmp.Transform()); diff != "" {
				t.Error(diff)
			}
			// The connection is an admin's, which helps it nothing.
			_, err := h.Client.GetWorkspace(ctx, &workspacev1.GetWorkspaceRequest{Name: "workspaces/b-1"})
			wantCode(t, err, codes.PermissionDenied, server.ReasonOutOfScope)
			_, err = h.Client.StopWorkspace(ctx, &workspacev1.StopWorkspaceRequest{Name: "workspaces/a-1"})
			wantCode(t, err, codes.PermissionDenied, server.ReasonRoleMissing)
			must2(h.Client.GetWorkspace(ctx, &workspacev1.GetWorkspaceRequest{Name: "workspaces/a-1"}))(t)
			// By a connection of nobody's it is worth the same.
			nobody := must2(h.As(access.Subject{}))(t)
			must2(nobody.Client.GetWorkspace(ctx, &workspacev1.GetWorkspaceRequest{Name: "workspaces/a-1"}))(t)
			if err := h.Restart(); err != nil {
				t.Fatal(err)
			}
		}
		if strings.Contains(h.log.String(), secret) || strings.Contains(h.log.String(), secret[12:]) {
			t.Error("the log has the token")
		}
	})
}

// Every token that is none is refused alike, on a connection that would do as well;
// only the log tells them apart.
func TestTokensThatAreNone(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		_, good := h.token(&workspacev1.Token{Subject: "ci", Roles: []workspacev1.Role{viewer}}, 0)
		md, _ := metadata.FromOutgoingContext(good)
		text := strings.TrimPrefix(md.Get("authorization")[0], "Bearer ")
		_, expired := h.token(&workspacev1.Token{Subject: "ci", Roles: []workspacev1.Role{viewer}}, time.Minute)
		gone, revoked := h.token(&workspacev1.Token{Subject: "ci", Roles: []workspacev1.Role{viewer}}, 0)
		must2(h.Admin.RevokeToken(h.ctx(), &workspacev1.RevokeTokenRequest{Name: gone.GetName()}))(t)
		advance(time.Minute)
		other := "A"
		if text[46] == 'A' {
			other = "E"
		}
		said := ""
		for name, ctx := range map[string]context.Context{
			"expired at":            expired,
			"was revoked":           revoked,
			"unknown token":         bearer(h.ctx(), "Bearer "+text[:46]+other),
			"what was sent is no":   bearer(h.ctx(), "Bearer "+text+"A"),
			"no bearer token":       bearer(h.ctx(), "Basic "+text),
			"more than one":         bearer(h.ctx(), "Bearer "+text, "Bearer "+text),
			"authorization is no b": bearer(h.ctx(), ""),
		} {
			_, err := h.Admin.GetServerInfo(ctx, &workspacev1.GetServerInfoRequest{})
			wantCode(t, err, codes.Unauthenticated, server.ReasonTokenInvalid)
			got := fmt.Sprint(status.Convert(err).Proto())
			if said != "" && got != said {
				t.Errorf("%s is told from the others: %s, not %s", name, got, said)
			}
			said = got
			if !strings.Contains(h.log.String(), name) {
				t.Errorf("the log does not tell of %q", name)
			}
			// Nor is it good for what is open to all.
			_, err = healthv1.NewHealthClient(h.Conn).Check(ctx, &healthv1.HealthCheckRequest{})
			if codeOf(err) != codes.Unauthenticated {
				t.Errorf("%s: health says %v", name, err)
			}
		}
		if got := h.whoAmI(good); got != "token:ci" {
			t.Errorf("the good one is %s", got)
		}
	})
}

// What lasts ends with the token: when it expires, and when it is revoked; others
// go on.
func TestTokensEndCalls(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		h.create("a")
		gate := h.HoldCycle("a")
		defer gate.Release()
		must2(h.Client.RestartWorkspace(h.ctx(), &workspacev1.RestartWorkspaceRequest{Name: "workspaces/a"}))(t)
		spec := &workspacev1.Token{Subject: "ci", Roles: []workspacev1.Role{viewer}}
		_, expires := h.token(spec, 30*time.Minute)
		revokes, revoked := h.token(spec, 24*time.Hour)
		_, stays := h.token(spec, 24*time.Hour)

		type outcome struct {
			what string
			err  error
			at   time.Duration
		}
		outcomes := make(chan outcome, 6)
		begin := time.Now()
		for name, ctx := range map[string]context.Context{"expires": expires, "revoked": revoked, "stays": stays} {
			ctx, cancel := context.WithTimeout(ctx, 3*time.Hour)
			defer cancel()
			stream := must2(h.Client.WatchWorkspaces(ctx, &workspacev1.WatchWorkspacesRequest{}))(t)
			recvUntil(t, stream, isSynced)
			go func() {
				var err error
				for err == nil {
					_, err = stream.Recv()
				}
				outcomes <- outcome{name + " watch", err, time.Since(begin)}
			}()
			go func() {
				_, err := h.Client.WaitWorkspace(ctx, &workspacev1.WaitWorkspaceRequest{Name: "workspaces/a"})
				outcomes <- outcome{name + " wait", err, time.Since(begin)}
			}()
		}
		synctest.Wait()
		next := func(name string, atLeast, atMost time.Duration) {
			t.Helper()
			for range 2 {
				o := <-outcomes
				if !strings.HasPrefix(o.what, name) || codeOf(o.err) != codes.Unauthenticated || o.at < atLeast || o.at > atMost {
					t.Errorf("%s ended after %v: %v, want %s after %v", o.what, o.at, o.err, name, atLeast)
				}
			}
		}
		advance(time.Minute)
		must2(h.Admin.RevokeToken(h.ctx(), &workspacev1.RevokeTokenRequest{Name: revokes.GetName()}))(t)
		next("revoked", time.Minute, time.Minute)
		next("expires", 30*time.Minute, 30*time.Minute+time.Second)
		advance(10 * time.Minute)
		select {
		case o := <-outcomes:
			t.Errorf("%s ended: %v", o.what, o.err)
		default:
		}
		if got := h.whoAmI(stays); got != "token:ci" {
			t.Error(got)
		}
	})
}

// A call whose request is long in coming is its caller's as it comes: a token that
// has ended meanwhile makes no change, and reads nothing.
func TestTokensEndWhileTheRequestComes(t *testing.T) {
	for name, end := range map[string]func(h *harness, token *workspacev1.Token){
		"revoked": func(h *harness, token *workspacev1.Token) {
			must2(h.Admin.RevokeToken(h.ctx(), &workspacev1.RevokeTokenRequest{Name: token.GetName()}))(h.t)
		},
		"expired": func(*harness, *workspacev1.Token) { advance(2 * time.Hour) },
	} {
		t.Run(name, func(t *testing.T) {
			run(t, func(t *testing.T, h *harness) {
				h.create("a")
				token, ctx := h.token(&workspacev1.Token{Subject: "ci", Roles: []workspacev1.Role{admin}}, time.Hour)
				calls := map[string]proto.Message{
					workspacev1.WorkspaceControl_RestartWorkspace_FullMethodName: &workspacev1.RestartWorkspaceRequest{Name: "workspaces/a"},
					workspacev1.WorkspaceControl_GetWorkspace_FullMethodName:     &workspacev1.GetWorkspaceRequest{Name: "workspaces/a"},
					workspacev1.AdminControl_CreateToken_FullMethodName:          &workspacev1.CreateTokenRequest{Token: &workspacev1.Token{Subject: "mine", Roles: []workspacev1.Role{admin}}},
				}
				streams := make(map[string]grpc.ClientStream)
				for method := range calls {
					streams[method] = must2(h.Conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true}, method))(t)
				}
				synctest.Wait() // they have arrived
				end(h, token)
				for method, stream := range streams {
					if err := errors.Join(stream.SendMsg(calls[method]), stream.CloseSend()); err != nil {
						t.Fatal(err)
					}
					wantCode(t, stream.RecvMsg(new(workspacev1.GetWorkspaceResponse)), codes.Unauthenticated, server.ReasonTokenInvalid)
				}
				if w := h.get("workspaces/a"); w.GetGeneration() != 1 {
					t.Errorf("generation %d", w.GetGeneration())
				}
				if n := len(h.tokens()); n != 1 {
					t.Errorf("%d tokens", n)
				}
			})
		})
	}
}

// A watcher who does not read gets nothing that was sent after the token's end.
func TestTokenOfASlowWatcher(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		for i := range 60 { // more than the buffers of a stream hold
			h.create(fmt.Sprintf("w%02d", i), func(r *createReq) {
				r.Workspace.Spec.Env = map[string]string{"E": strings.Repeat("x", 30<<10)}
			})
		}
		token, ctx := h.token(&workspacev1.Token{Subject: "ci", Roles: []workspacev1.Role{viewer}}, 0)
		stream := must2(h.Client.WatchWorkspaces(ctx, &workspacev1.WatchWorkspacesRequest{}))(t)
		synctest.Wait() // it is stuck
		must2(h.Admin.RevokeToken(h.ctx(), &workspacev1.RevokeTokenRequest{Name: token.GetName()}))(t)
		for n := 0; ; n++ {
			if _, err := stream.Recv(); err != nil {
				wantCode(t, err, codes.Unauthenticated, server.ReasonTokenInvalid)
				if n > 20 {
					t.Errorf("%d events came", n)
				}
				return
			}
		}
	})
}

func TestTokensList(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		spec := &workspacev1.Token{Subject: "ci", Roles: []workspacev1.Role{viewer}}
		var last *workspacev1.Token
		for range 50 {
			last, _ = h.token(spec, time.Hour)
		}
		_, err := h.Admin.CreateToken(h.ctx(), &workspacev1.CreateTokenRequest{Token: spec})
		wantCode(t, err, codes.ResourceExhausted, server.ReasonTooManyTokens)
		h.token(&workspacev1.Token{Subject: "cd", Roles: []workspacev1.Role{admin}}, 0)

		revoke := &workspacev1.RevokeTokenRequest{Name: last.GetName()}
		for _, changed := range []bool{true, false} {
			resp := must2(h.Admin.RevokeToken(h.ctx(), revoke))(t)
			if resp.GetChanged() != changed || resp.GetToken().GetRevokeTime() == nil {
				t.Errorf("got %v", resp)
			}
		}
		_, err = h.Admin.RevokeToken(h.ctx(), &workspacev1.RevokeTokenRequest{Name: "tokens/none"})
		wantCode(t, err, codes.NotFound, server.ReasonTokenNotFound)
		_, used := h.token(spec, time.Hour) // there is room again

		var names []string
		req := &workspacev1.ListTokensRequest{PageSize: 20}
		for {
			resp := must2(h.Admin.ListTokens(h.ctx(), req))(t)
			for _, token := range resp.GetTokens() {
				names = append(names, token.GetName())
			}
			if req.PageToken = resp.GetNextPageToken(); req.PageToken == "" {
				break
			}
		}
		var all []string
		for _, token := range h.tokens() {
			all = append(all, token.GetName())
		}
		if diff := cmp.Diff(all, names); diff != "" || len(all) != 52 {
			t.Errorf("%d tokens: %s", len(all), diff)
		}
		_, err = h.Admin.ListTokens(h.ctx(), &workspacev1.ListTokensRequest{PageToken: "x"})
		wantCode(t, err, codes.InvalidArgument, server.ReasonInvalidFields)
		h.whoAmI(used)
	})
}

// The last use is told at once, written once a minute for all, and by a restart
// nothing is lost but what came after that.
func TestTokensLastUse(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		_, ctx := h.token(&workspacev1.Token{Subject: "ci", Roles: []workspacev1.Role{viewer}}, 0)
		if used := h.tokens()[0].GetLastUseTime(); used != nil {
			t.Errorf("used at %v before it was", used.AsTime())
		}
		advance(10 * time.Second)
		first := time.Now()
		for range 100 {
			h.whoAmI(ctx)
		}
		if got := h.tokens()[0].GetLastUseTime().AsTime(); !got.Equal(first) {
			t.Errorf("last used at %v, want %v", got, first)
		}
		advance(access.TendInterval + time.Second)
		second := time.Now()
		h.whoAmI(ctx)
		if err := h.Restart(); err != nil { // as if it were killed
			t.Fatal(err)
		}
		if got := h.tokens()[0].GetLastUseTime().AsTime(); !got.Equal(first) {
			t.Errorf("after a restart: last used at %v, want %v, and not %v", got, first, second)
		}
	})
}

func TestCreateTokenRefuses(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		good := &workspacev1.Token{Subject: "ci", Roles: []workspacev1.Role{viewer}}
		for name, test := range map[string]struct {
			edit  func(*workspacev1.CreateTokenRequest)
			field string
		}{
			"no token":     {func(r *workspacev1.CreateTokenRequest) { r.Token = nil }, "token"},
			"no subject":   {func(r *workspacev1.CreateTokenRequest) { r.Token.Subject = "" }, "token.subject"},
			"bad subject":  {func(r *workspacev1.CreateTokenRequest) { r.Token.Subject = "unix:uid=0" }, "token.subject"},
			"no role":      {func(r *workspacev1.CreateTokenRequest) { r.Token.Roles = nil }, "token.roles"},
			"no such role": {func(r *workspacev1.CreateTokenRequest) { r.Token.Roles[0] = 99 }, "token.roles[0]"},
			"the daemon's": {func(r *workspacev1.CreateTokenRequest) { r.Token.Roles[0] = workspacev1.Role_ROLE_WORKSPACE }, "token.roles[0]"},
			"a role twice": {func(r *workspacev1.CreateTokenRequest) { r.Token.Roles = append(r.Token.Roles, viewer) }, "token.roles"},
			"an admin of some": {func(r *workspacev1.CreateTokenRequest) {
				r.Token.Roles[0] = admin
				r.Token.Scope = &workspacev1.AccessScope{Workspaces: "a"}
			}, "token.scope"},
			"a bad scope": {func(r *workspacev1.CreateTokenRequest) { r.Token.Scope = &workspacev1.AccessScope{Workspaces: "*"} }, "token.scope.workspaces"},
			"a bad label": {func(r *workspacev1.CreateTokenRequest) {
				r.Token.Scope = &workspacev1.AccessScope{Labels: map[string]string{"A": "b"}}
			}, `token.scope.labels["A"]`},
			"too short": {func(r *workspacev1.CreateTokenRequest) { r.Ttl = durationpb.New(time.Second) }, "ttl"},
			"too long":  {func(r *workspacev1.CreateTokenRequest) { r.Ttl = durationpb.New(367 * 24 * time.Hour) }, "ttl"},
		} {
			req := &workspacev1.CreateTokenRequest{Token: proto.Clone(good).(*workspacev1.Token)}
			test.edit(req)
			_, err := h.Admin.CreateToken(h.ctx(), req)
			if _, ok := fields(err)[test.field]; !ok || codeOf(err) != codes.InvalidArgument {
				t.Errorf("%s: got %v, fields %v, want %s", name, err, fields(err), test.field)
			}
		}
		resp := must2(h.Admin.CreateToken(h.ctx(), &workspacev1.CreateTokenRequest{Token: good, ValidateOnly: true}))(t)
		if resp.GetSecret() != "" || len(h.tokens()) != 0 {
			t.Errorf("got %v, and there are %v", resp, h.tokens())
		}
	})
}
