/** Resolves the first argument, connects to its port 80, starts a child process: prints one line for each. */
import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.net.HttpURLConnection;
import java.net.Inet4Address;
import java.net.InetAddress;
import java.net.URL;

public class Resolve {
    public static void main(String[] arguments) throws Exception {
        for (InetAddress address : InetAddress.getAllByName(arguments[0])) {
            if (address instanceof Inet4Address) {
                System.out.println("resolved " + address.getHostAddress());
            }
        }
        HttpURLConnection connection = (HttpURLConnection) new URL("http://" + arguments[0] + "/").openConnection();
        System.out.println("connected " + connection.getHeaderField(0).substring(0, 12));
        Process child = new ProcessBuilder("echo", "child").start();
        System.out.println(new BufferedReader(new InputStreamReader(child.getInputStream())).readLine());
    }
}
