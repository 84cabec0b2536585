package server_test

import (
	"slices"
	"testing"
	"testing/synctest"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	reflectionv1 "google.golang.org/grpc/reflection/grpc_reflection_v1"
	reflectionv1alpha "google.golang.org/grpc/reflection/grpc_reflection_v1alpha"

	"github.com/workspaced/workspaced/server"
	"github.com/workspaced/workspaced/server/loop"
)

const serviceName = "workspace.v1.WorkspaceControl"

// watchHealth watches the service's health, SERVING now. The returned func
// checks what comes next, and that then the stream ends with UNAVAILABLE.
func watchHealth(t *testing.T, conn *grpc.ClientConn) func(want string) {
	t.Helper()
	stream := must2(healthv1.NewHealthClient(conn).Watch(t.Context(), &healthv1.HealthCheckRequest{Service: serviceName}))(t)
	if got := must2(stream.Recv())(t).GetStatus().String(); got != "SERVING" {
		t.Errorf("got %s", got)
	}
	return func(want string) {
		t.Helper()
		if got := must2(stream.Recv())(t).GetStatus().String(); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
		_, err := stream.Recv()
		wantCode(t, err, codes.Unavailable, "DRAINING")
	}
}

func TestHealth(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		check := func(service string) string {
			resp := must2(healthv1.NewHealthClient(h.Conn).Check(h.ctx(), &healthv1.HealthCheckRequest{Service: service}))(t)
			return resp.GetStatus().String()
		}
		next := watchHealth(t, h.Conn)
		for _, service := range []string{"", serviceName} {
			if got := check(service); got != "SERVING" {
				t.Errorf("%q is %s", service, got)
			}
		}
		_, err := healthv1.NewHealthClient(h.Conn).Check(h.ctx(), &healthv1.HealthCheckRequest{Service: "nothing"})
		wantCode(t, err, codes.NotFound, "")
		h.Drain()
		next("NOT_SERVING")
		for _, service := range []string{"", serviceName} {
			if got := check(service); got != "NOT_SERVING" {
				t.Errorf("draining %q is %s", service, got)
			}
		}
	})
}

// Each background loop is a service of its own, and can be watched. The daemon
// as a whole serves on when one is stale.
func TestHealthOfLoops(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, conn, _ := serve(t, server.Config{Store: &faultyStore{}, Hub: make(hints)})
		publish := func(stale bool) {
			s.PublishLoops([]loop.Status{{Name: "sweep", Stale: stale}, {Name: "store"}})
		}
		publish(false)
		client := healthv1.NewHealthClient(conn)
		stream := must2(client.Watch(t.Context(), &healthv1.HealthCheckRequest{Service: "loop.sweep"}))(t)
		next := func(want string) {
			t.Helper()
			if got := must2(stream.Recv())(t).GetStatus().String(); got != want {
				t.Errorf("got %s, want %s", got, want)
			}
		}
		check := func(want map[string]string) {
			t.Helper()
			for service, want := range want {
				resp := must2(client.Check(t.Context(), &healthv1.HealthCheckRequest{Service: service}))(t)
				if got := resp.GetStatus().String(); got != want {
					t.Errorf("%q is %s, want %s", service, got, want)
				}
			}
		}
		next("SERVING")
		for range 3 { // the watcher is told once
			publish(true)
		}
		next("NOT_SERVING")
		check(map[string]string{"": "SERVING", serviceName: "SERVING", "loop.sweep": "NOT_SERVING", "loop.store": "SERVING"})
		publish(false)
		next("SERVING")
		s.Drain()
		publish(false)
		next("NOT_SERVING")
		check(map[string]string{"": "NOT_SERVING", serviceName: "NOT_SERVING", "loop.sweep": "NOT_SERVING", "loop.store": "NOT_SERVING"})
		_, err := stream.Recv()
		wantCode(t, err, codes.Unavailable, "DRAINING")
	})
}

func TestReflection(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		want := []string{"grpc.health.v1.Health", serviceName}
		v1 := must2(reflectionv1.NewServerReflectionClient(h.Conn).ServerReflectionInfo(h.ctx()))(t)
		if err := v1.Send(&reflectionv1.ServerReflectionRequest{MessageRequest: &reflectionv1.ServerReflectionRequest_ListServices{}}); err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, s := range must2(v1.Recv())(t).GetListServicesResponse().GetService() {
			got = append(got, s.GetName())
		}
		for _, w := range want {
			if !slices.Contains(got, w) {
				t.Errorf("v1 lists %q", got)
			}
		}
		reflectAlpha(t, h)
		if err := v1.CloseSend(); err != nil {
			t.Error(err)
		}
	})
}

//nolint:staticcheck // v1alpha is what older tools speak
func reflectAlpha(t *testing.T, h *harness) {
	t.Helper()
	stream := must2(reflectionv1alpha.NewServerReflectionClient(h.Conn).ServerReflectionInfo(h.ctx()))(t)
	if err := stream.Send(&reflectionv1alpha.ServerReflectionRequest{
		MessageRequest: &reflectionv1alpha.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: serviceName},
	}); err != nil {
		t.Fatal(err)
	}
	if files := must2(stream.Recv())(t).GetFileDescriptorResponse().GetFileDescriptorProto(); len(files) == 0 {
		t.Error("v1alpha does not describe the service")
	}
	if err := stream.CloseSend(); err != nil {
		t.Error(err)
	}
}
