package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"time"
)

// call is a call that the program makes to the daemon, as its workspace's
// container: with nothing but the standard library, for a unary call of gRPC is a
// POST by HTTP/2 whose body is the message behind its length.
func call(ctx context.Context, method, token string, message []byte) (answer []byte, status, text string, err error) {
	socket, ok := strings.CutPrefix(os.Getenv("WORKSPACE_API"), "unix://")
	if !ok {
		return nil, "", "", errors.New("no WORKSPACE_API")
	}
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true)
	transport := &http.Transport{Protocols: protocols, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}
	defer transport.CloseIdleConnections()
	frame := append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(message))), message...)
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://workspaced/"+method, bytes.NewReader(frame))
	if err != nil {
		return nil, "", "", err
	}
	req.Header.Set("Content-Type", "application/grpc+proto")
	req.Header.Set("Te", "trailers")
	req.Header.Set("Authorization", "Bearer "+token)
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return nil, "", "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, "", "", err
	}
	const prefix = 5
	if len(body) >= prefix {
		answer = body[prefix:]
	}
	end := func(key string) string { return cmp.Or(resp.Trailer.Get(key), resp.Header.Get(key)) }
	return answer, end("Grpc-Status"), end("Grpc-Message"), nil
}

// handleCall makes the call of the path with the request's body, with the token of
// the program's environment or file, or with the one in the header Token.
func handleCall(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), 10*time.Second)
	defer cancel()
	message, err := io.ReadAll(http.MaxBytesReader(w, r.Body, 1<<20))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	token := cmp.Or(r.Header.Get("Token"), os.Getenv("WORKSPACE_TOKEN"))
	if file, err := os.ReadFile("/run/secrets/WORKSPACE_TOKEN"); token == "" && err == nil {
		token = string(file)
	}
	answer, status, text, err := call(ctx, r.PathValue("method"), token, message)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	w.Header().Set("Grpc-Status", status)
	w.Header().Set("Grpc-Message", text)
	_, _ = w.Write(answer)
}
